//! Where libvirt's daemon listens, by the URI of a connection. Pure.

use std::path::PathBuf;

use crate::libvirt::error::Error;

/// Where a daemon may listen, and what it is to be asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// The URI that the daemon itself understands.
    pub uri: &'static str,
    /// Its socket: the first one that answers.
    pub sockets: Vec<PathBuf>,
}

/// Reads a URI. `runtime_dir` is where a user's own daemon keeps its socket.
pub(crate) fn place(uri: &str, runtime_dir: Option<PathBuf>) -> Result<Place, Error> {
    let refused = |why: &str| Error::Uri { uri: uri.to_owned(), why: why.to_owned() };
    let (scheme, rest) = uri.split_once("://").ok_or_else(|| refused("it has no scheme"))?;
    match scheme {
        "qemu" | "qemu+unix" => {}
        _ if scheme.starts_with("qemu+") => {
            return Err(refused("its disks are read on the machine they are on: run a site there"));
        }
        _ => return Err(refused("only QEMU's domains are protected")),
    }
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (uri, folder) = match path {
        "/system" => ("qemu:///system", Some(PathBuf::from("/run/libvirt"))),
        "/session" => ("qemu:///session", runtime_dir.map(|dir| dir.join("libvirt"))),
        _ if !path.starts_with('/') => return Err(refused("it names another machine: run a site there")),
        _ => return Err(refused("its path is neither /system nor /session")),
    };
    let given = query.split('&').find_map(|pair| pair.strip_prefix("socket="));
    let sockets = match (given, folder) {
        (Some(path), _) => vec![PathBuf::from(unescaped(path).ok_or_else(|| refused("its '%' are wrong"))?)],
        // A daemon for QEMU alone, or the one for everything.
        (None, Some(folder)) => ["virtqemud-sock", "libvirt-sock"].map(|name| folder.join(name)).into(),
        (None, None) => return Err(refused("XDG_RUNTIME_DIR is not set, so the socket is not known")),
    };
    Ok(Place { uri, sockets })
}

/// A text with its `%41` replaced by what they stand for.
fn unescaped(text: &str) -> Option<String> {
    let mut parts = text.split('%');
    let mut bytes = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let (digits, rest) = part.split_at_checked(2)?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        bytes.extend(rest.as_bytes());
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_says_where_the_daemon_listens() {
        let sockets = |uri: &str| place(uri, Some("/run/user/7".into())).map(|place| place.sockets);
        assert_eq!(
            sockets("qemu:///system").unwrap(),
            [PathBuf::from("/run/libvirt/virtqemud-sock"), PathBuf::from("/run/libvirt/libvirt-sock")]
        );
        assert_eq!(sockets("qemu:///session").unwrap()[1], PathBuf::from("/run/user/7/libvirt/libvirt-sock"));
        let given = sockets("qemu+unix:///session?mode=legacy&socket=/tmp/a%20b/libvirt-sock").unwrap();
        assert_eq!(given, [PathBuf::from("/tmp/a b/libvirt-sock")]);
        assert_eq!(place("qemu:///session?socket=/s", None).unwrap().uri, "qemu:///session");
    }

    #[test]
    fn one_that_is_of_no_use_says_why() {
        for (uri, why) in [
            ("web", "no scheme"),
            ("xen:///system", "only QEMU"),
            ("qemu+ssh://host/system", "run a site there"),
            ("qemu://host/system", "another machine"),
            ("qemu:///embed", "neither"),
            ("qemu:///session", "XDG_RUNTIME_DIR"),
            ("qemu:///session?socket=/a%2", "'%'"),
            ("qemu:///session?socket=/a%zz", "'%'"),
        ] {
            let error = place(uri, None).unwrap_err().to_string();
            assert!(error.contains(why) && error.contains(uri), "{error}");
        }
    }
}

//! Which VMs a policy is for.

use std::collections::BTreeSet;

use model::VmName;
use model::authorization::VmPatterns;

/// Which VMs are meant: those whose name fits, and those that have one of the tags; without those that are excepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    pub(crate) vms: VmPatterns,
    pub(crate) tags: BTreeSet<String>,
    pub(crate) except: VmPatterns,
}

impl Selection {
    /// Whether this VM is meant.
    #[must_use]
    pub fn selects(&self, vm: &VmName, tags: &BTreeSet<String>) -> bool {
        let meant = self.vms.fits(vm.as_str()) || !self.tags.is_disjoint(tags);
        meant && !self.except.fits(vm.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_or_a_tag_selects_and_an_exception_does_not() {
        let tags = |tags: &[&str]| tags.iter().map(|&tag| tag.to_owned()).collect::<BTreeSet<_>>();
        let selection = Selection {
            vms: "web*".parse().unwrap(),
            tags: tags(&["gold"]),
            except: "web-test,db-test".parse().unwrap(),
        };
        let selects = |vm: &str, of: &[&str]| selection.selects(&vm.parse().unwrap(), &tags(of));
        assert!(selects("web1", &[]) && selects("db", &["silver", "gold"]));
        assert!(!selects("db", &["silver"]) && !selects("web-test", &[]) && !selects("db-test", &["gold"]));
    }
}

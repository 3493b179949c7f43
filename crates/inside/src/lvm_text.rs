//! LVM's metadata: a text of sections, numbers, words and lists.

use std::collections::BTreeMap;

/// How deep sections may lie in one another; LVM has four.
const DEPTH_MAX: usize = 16;

/// A value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Value {
    Number(u64),
    Text(String),
    List(Vec<Value>),
    Section(BTreeMap<String, Value>),
}

impl Value {
    pub fn get(&self, key: &str) -> Option<&Self> {
        match self {
            Self::Section(values) => values.get(key),
            _ => None,
        }
    }

    pub fn number(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Self::Number(number) => Some(*number),
            _ => None,
        }
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_text()
    }

    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn section(&self) -> impl Iterator<Item = (&String, &Self)> {
        match self {
            Self::Section(values) => Some(values.iter()),
            _ => None,
        }
        .into_iter()
        .flatten()
    }
}

/// Reads a text; none if it is not one.
pub(crate) fn parse(text: &str) -> Option<Value> {
    let mut reader = Reader { text: text.as_bytes(), at: 0 };
    reader.section(0, true)
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    /// The next byte that is neither space nor comment.
    fn peek(&mut self) -> Option<u8> {
        loop {
            let byte = *self.text.get(self.at)?;
            match byte {
                b'#' => {
                    let rest = &self.text[self.at..];
                    self.at += rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
                }
                byte if byte.is_ascii_whitespace() => self.at += 1,
                0 => return None,
                byte => return Some(byte),
            }
        }
    }

    fn word(&mut self) -> Option<String> {
        self.peek()?;
        let rest = &self.text[self.at..];
        let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || b"_-.+/".contains(byte);
        let len = rest.iter().take_while(|byte| is_word(byte)).count();
        self.at += len;
        (len > 0).then(|| String::from_utf8_lossy(&rest[..len]).into_owned())
    }

    fn section(&mut self, depth: usize, is_whole: bool) -> Option<Value> {
        let mut values = BTreeMap::new();
        while let Some(byte) = self.peek() {
            if byte == b'}' && !is_whole {
                self.at += 1;
                return Some(Value::Section(values));
            }
            let key = self.word()?;
            let opens = self.peek()?;
            self.at += 1;
            let value = match opens {
                b'{' if depth < DEPTH_MAX => self.section(depth + 1, false)?,
                b'=' => self.value(true)?,
                _ => return None,
            };
            values.insert(key, value);
        }
        is_whole.then_some(Value::Section(values))
    }

    fn value(&mut self, may_be_list: bool) -> Option<Value> {
        match self.peek()? {
            b'[' if may_be_list => self.list(),
            b'"' => self.quoted(),
            _ => self.word()?.parse().ok().map(Value::Number),
        }
    }

    fn list(&mut self) -> Option<Value> {
        self.at += 1;
        let mut values = Vec::new();
        loop {
            match self.peek()? {
                b']' => {
                    self.at += 1;
                    return Some(Value::List(values));
                }
                b',' => self.at += 1,
                _ => values.push(self.value(false)?),
            }
        }
    }

    fn quoted(&mut self) -> Option<Value> {
        self.at += 1;
        let mut text = Vec::new();
        loop {
            let byte = *self.text.get(self.at)?;
            self.at += 1;
            match byte {
                b'"' => return Some(Value::Text(String::from_utf8_lossy(&text).into_owned())),
                b'\\' => {
                    text.push(*self.text.get(self.at)?);
                    self.at += 1;
                }
                byte => text.push(byte),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_read_and_half_of_one_is_not() {
        let text = "# made by hand\nvg0 {\nid = \"a-b\" # so\nseqno = 3\nflags = []\nlv {\nstripes = [\n\"pv0\", 0\n]\n}\n}\n\0rest";
        let read = parse(text).unwrap();
        let vg = read.get("vg0").unwrap();
        assert_eq!((vg.text("id"), vg.number("seqno")), (Some("a-b"), Some(3)));
        let stripes = Value::List(vec![Value::Text("pv0".into()), Value::Number(0)]);
        assert_eq!(vg.get("lv").unwrap().get("stripes"), Some(&stripes));
        for end in 0..text.len() - 8 {
            let _ = parse(&text[..end]);
        }
        for bad in ["a {", "a = [", "a = \"", "a", "= 3", "a = b", "}", &"a {".repeat(100_000)] {
            assert_eq!(parse(bad), None);
        }
    }
}

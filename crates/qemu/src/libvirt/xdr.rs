//! XDR (RFC 4506), as far as libvirt's messages need it: big-endian words, everything padded to four bytes. Pure.

/// Puts values together.
#[derive(Debug, Default)]
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    /// A number.
    pub fn number(mut self, value: u32) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    /// A number with a sign.
    pub fn signed(self, value: i32) -> Self {
        self.number(u32::from_be_bytes(value.to_be_bytes()))
    }

    /// Bytes whose count both sides know.
    pub fn fixed(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// A text.
    pub fn text(self, text: &str) -> Self {
        // Whoever sends more than that is refused by the other side.
        self.number(u32::try_from(text.len()).unwrap_or(u32::MAX)).fixed(text.as_bytes())
    }

    /// A value that may be missing, and is there.
    pub fn some(self) -> Self {
        self.number(1)
    }

    /// A value that is missing.
    pub fn none(self) -> Self {
        self.number(0)
    }

    /// All of it.
    pub fn done(self) -> Vec<u8> {
        self.0
    }
}

/// A message that ends too early, or has a value that it cannot have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed;

/// Takes values apart. Never reads past the end and never takes more memory than it was given.
#[derive(Debug, Clone)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub fn number(&mut self) -> Result<u32, Malformed> {
        let (word, rest) = self.0.split_first_chunk::<4>().ok_or(Malformed)?;
        self.0 = rest;
        Ok(u32::from_be_bytes(*word))
    }

    pub fn signed(&mut self) -> Result<i32, Malformed> {
        self.number().map(|value| i32::from_be_bytes(value.to_be_bytes()))
    }

    /// A number of eight bytes.
    pub fn long(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from(self.number()?) << 32 | u64::from(self.number()?))
    }

    pub fn fixed(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let padded = len.checked_next_multiple_of(4).ok_or(Malformed)?;
        let (bytes, rest) = self.0.split_at_checked(padded).ok_or(Malformed)?;
        self.0 = rest;
        Ok(&bytes[..len])
    }

    pub fn text(&mut self) -> Result<String, Malformed> {
        let len = usize::try_from(self.number()?).map_err(|_| Malformed)?;
        Ok(String::from_utf8_lossy(self.fixed(len)?).into_owned())
    }

    /// Whether a value that may be missing is there.
    pub fn is_some(&mut self) -> Result<bool, Malformed> {
        match self.number()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Malformed),
        }
    }

    /// A text that may be missing.
    pub fn optional_text(&mut self) -> Result<Option<String>, Malformed> {
        if self.is_some()? { self.text().map(Some) } else { Ok(None) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_is_as_the_standard_says() {
        let bytes = Writer::default().text("qemu:").some().signed(-2).done();
        assert_eq!(bytes, b"\0\0\0\x05qemu:\0\0\0\0\0\0\x01\xff\xff\xff\xfe");
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(
            texts in prop::collection::vec(".{0,9}", 0..5), number: u32, signed: i32, fixed: [u8; 5]
        ) {
            let written = texts.iter().fold(Writer::default(), |writer, text| writer.text(text));
            let bytes = written.number(number).signed(signed).fixed(&fixed).some().text("x").none().done();
            prop_assert_eq!(bytes.len() % 4, 0);
            let mut reader = Reader::new(&bytes);
            for text in &texts {
                prop_assert_eq!(&reader.text().unwrap(), text);
            }
            prop_assert_eq!(reader.number(), Ok(number));
            prop_assert_eq!(reader.signed(), Ok(signed));
            prop_assert_eq!(reader.fixed(5), Ok(&fixed[..]));
            prop_assert_eq!(reader.optional_text(), Ok(Some("x".into())));
            prop_assert_eq!(reader.optional_text(), Ok(None));
            prop_assert_eq!(reader.number(), Err(Malformed));
        }

        #[test]
        fn no_bytes_can_make_it_panic(bytes: Vec<u8>, len: usize) {
            let mut reader = Reader::new(&bytes);
            let _ = (reader.optional_text(), reader.text(), reader.fixed(len), reader.long(), reader.signed());
        }
    }
}

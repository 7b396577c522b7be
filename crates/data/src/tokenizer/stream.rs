//! Ids to text while they arrive.

use super::Tokenizer;

/// Gives text as ids arrive, holding back bytes that do not yet make a character. What it gives for any ids of the bytes
/// tokenizer is what [`Tokenizer::decode`] gives for all of them, with [`rest`](StreamDecoder::rest) behind it.
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    // Bytes not shown yet, of the bytes tokenizer.
    bytes: Vec<u8>,
    // The last ids of any other: those up to `shown` are context (some decoders treat the first token differently).
    ids: Vec<u32>,
    shown: usize,
}

/// Tokens after which text with an unfinished character is shown anyway: a character has at most four bytes.
const LONGEST_CHARACTER: usize = 4;

impl<'a> StreamDecoder<'a> {
    /// A decoder at the start of a text.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, bytes: Vec::new(), ids: Vec::new(), shown: 0 }
    }

    /// The text that `id` completes, if it completes any.
    pub fn push(&mut self, id: u32) -> Option<String> {
        let text = match &self.tokenizer.inner {
            None => self.push_byte(id),
            Some(_) => self.push_token(id),
        };
        (!text.is_empty()).then_some(text)
    }

    /// What is still held back, at the end: a character that was never finished, as [`Tokenizer::decode`] shows it.
    pub fn rest(&self) -> String {
        let before = self.tokenizer.decode(&self.ids[..self.shown]);
        let tokens = self.tokenizer.decode(&self.ids);
        match &self.tokenizer.inner {
            None => String::from_utf8_lossy(&self.bytes).into_owned(),
            Some(_) if self.ids.len() == self.shown => String::new(),
            Some(_) => tokens
                .strip_prefix(&before)
                .map_or_else(|| self.tokenizer.decode(&self.ids[self.shown..]), str::to_owned),
        }
    }

    fn push_byte(&mut self, id: u32) -> String {
        self.bytes.extend(u8::try_from(id));
        let unfinished = unfinished(&self.bytes);
        let rest = self.bytes.split_off(self.bytes.len() - unfinished);
        let whole = std::mem::replace(&mut self.bytes, rest);
        String::from_utf8_lossy(&whole).into_owned()
    }

    fn push_token(&mut self, id: u32) -> String {
        self.ids.push(id);
        let before = self.tokenizer.decode(&self.ids[..self.shown]);
        let text = self.tokenizer.decode(&self.ids);
        let pending = self.ids.len() - self.shown;
        if text.ends_with('\u{FFFD}') && pending < LONGEST_CHARACTER {
            return String::new();
        }
        // Where new tokens change what the context decodes to (bytes that were no character become one), they are
        // decoded by themselves: what has been shown cannot be taken back.
        let new = match text.strip_prefix(&before) {
            Some(new) => new.to_owned(),
            None => self.tokenizer.decode(&self.ids[self.shown..]),
        };
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        new
    }
}

/// How many bytes at the end begin a character that further bytes can finish.
fn unfinished(mut bytes: &[u8]) -> usize {
    while let Err(error) = std::str::from_utf8(bytes) {
        match error.error_len() {
            Some(wrong) => bytes = &bytes[error.valid_up_to() + wrong..],
            // Without a length, the error is that the bytes end too early.
            None => return bytes.len() - error.valid_up_to(),
        }
    }
    0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const TEXT: &str = "Hello, wörld! 🦀 naïve\n\ttabs \u{7f} end";

    #[test]
    fn streaming_never_shows_half_a_character() {
        let bytes = Tokenizer::bytes();
        let mut stream = StreamDecoder::new(&bytes);
        let parts: Vec<String> = bytes.encode(TEXT).unwrap().into_iter().filter_map(|id| stream.push(id)).collect();
        assert!(parts.iter().all(|part| !part.contains('\u{FFFD}')));
        assert_eq!(parts.concat(), TEXT);
    }

    #[test]
    fn streaming_bytes_that_are_no_text_agrees_with_decoding_them() {
        let bytes = Tokenizer::bytes();
        // Wrong bytes before a crab; then an é, and characters broken off by others and by a special token.
        let wrong =
            vec![0xFF, 0xFF, 0xFF, 0xF0, 0x9F, 0xA6, 0x80, 0xC3, 0xA9, 0xF0, 0x9F, 0x61, 0xE2, 0xC3, 0xA9, 256, 0x62];
        let mut random = 7u64;
        let noise = (0..4000).map(|_| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) as u32 % 258
        });
        for mut ids in [wrong, noise.collect::<Vec<u32>>()] {
            ids.push(u32::from(b'.')); // finishes, or breaks off, what is held back
            let mut stream = StreamDecoder::new(&bytes);
            let parts: Vec<String> = ids.iter().filter_map(|&id| stream.push(id)).collect();
            assert_eq!((parts.concat(), stream.rest()), (bytes.decode(&ids), String::new()));
        }
        // What is never finished comes in the end.
        let mut stream = StreamDecoder::new(&bytes);
        let parts: Vec<String> = [0x62, 0xE2, 0x82].iter().filter_map(|&id| stream.push(id)).collect();
        assert_eq!(
            (parts.concat() + &stream.rest(), stream.rest()),
            (bytes.decode(&[0x62, 0xE2, 0x82]), "\u{FFFD}".into())
        );
    }
}

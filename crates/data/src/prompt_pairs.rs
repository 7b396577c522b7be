//! Pairs of prompts that differ in what matters: read from files, or generated for three behaviours (Elhage et al. 2021; Wang et al.
//! 2022, arXiv 2211.00593; Hanna et al. 2023, arXiv 2305.00586) out of words that are one token of the model's tokenizer.

use polyhead_models::PromptPair;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde_json::Value;

use crate::random::{generator, permute, some};
use crate::texts::FromFiles;
use crate::{DataError, Tokenizer, files};

/// A text, or ids of tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Prompt {
    /// A text.
    Text(String),
    /// Ids, for models that have no tokenizer.
    Ids(Vec<u32>),
}

impl Prompt {
    fn read(row: &Value, field: &str) -> Result<Self, String> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let found = match row.get(field) {
            Some(Value::String(text)) => Some(Self::Text(text.clone())),
            Some(Value::Array(ids)) => ids.iter().map(id).collect::<Option<_>>().map(Self::Ids),
            Some(number) => id(number).map(|id| Self::Ids(vec![id])),
            None => None,
        };
        found.ok_or_else(|| match (row.get(field), row.as_object()) {
            (Some(other), _) => format!("field \"{field}\" holds {other}: a text or a list of token ids is expected"),
            (None, Some(row)) => {
                let names = row.keys().cloned().collect::<Vec<_>>().join(", ");
                format!(
                    "there is no field \"{field}\" (the row has {names}); a pair has clean, corrupt, right and wrong"
                )
            }
            (None, None) => "the row is not an object".into(),
        })
    }

    /// `before` and this, where both are texts: what follows a text is tokenized behind it.
    fn behind(&self, before: &Self) -> Self {
        match (before, self) {
            (Self::Text(before), Self::Text(text)) => Self::Text(format!("{before}{text}")),
            _ => self.clone(),
        }
    }

    fn ids(&self, tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>, String> {
        match (self, tokenizer) {
            (Self::Ids(ids), _) => Ok(ids.clone()),
            (Self::Text(text), Some(tokenizer)) => tokenizer.encode_prompt(text).map_err(|error| error.to_string()),
            (Self::Text(text), None) => Err(format!("the model has no tokenizer for {text:?}: give token ids")),
        }
    }
}

/// A pair as it is written: with `clean` and `corrupt` prompts of one length, and the `right` and the `wrong` answer to the clean one,
/// of which the first token counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WrittenPair {
    /// The prompt after which `right` is right.
    pub clean: Prompt,
    /// The prompt in which what matters is another.
    pub corrupt: Prompt,
    /// The answer to the clean prompt.
    pub right: Prompt,
    /// Another one.
    pub wrong: Prompt,
}

impl WrittenPair {
    fn read(row: &Value) -> Result<Self, String> {
        let [clean, corrupt, right, wrong] =
            ["clean", "corrupt", "right", "wrong"].map(|field| Prompt::read(row, field));
        Ok(Self { clean: clean?, corrupt: corrupt?, right: right?, wrong: wrong? })
    }

    /// The ids of the pair, which is checked.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn ids(&self, tokenizer: Option<&Tokenizer>, vocab: usize) -> Result<PromptPair, String> {
        let [clean, corrupt] = [&self.clean, &self.corrupt].map(|prompt| prompt.ids(tokenizer));
        let (clean, corrupt) = (clean?, corrupt?);
        let answer = |prompt: &Prompt| -> Result<u32, String> {
            let whole = prompt.behind(&self.clean).ids(tokenizer)?;
            // What is written behind a prompt can change how the prompt itself is tokenized.
            let first = match whole.strip_prefix(&clean[..]) {
                Some(answer) => answer.first().copied(),
                None => prompt.ids(tokenizer)?.first().copied(),
            };
            first.ok_or_else(|| "an answer has no tokens: give a longer one".into())
        };
        let pair = PromptPair { right: answer(&self.right)?, wrong: answer(&self.wrong)?, clean, corrupt };
        pair.check(vocab)?;
        Ok(pair)
    }
}

/// Reads pairs, a row each, for a model of so many ids.
///
/// # Errors
/// If a pattern matches nothing, or a pair cannot be used: its file, its line and the rule.
pub fn read_prompt_pairs(
    paths: &[String],
    tokenizer: Option<&Tokenizer>,
    vocab: usize,
) -> Result<FromFiles<PromptPair>, DataError> {
    let mut items = Vec::new();
    let left_out =
        files::for_each_row(&files::rows_of(paths)?, &["clean", "corrupt", "right", "wrong"], &mut |place, row| {
            let pair = row.value().and_then(|row| WrittenPair::read(&row)?.ids(tokenizer, vocab));
            items.push(pair.map_err(|problem| place.wrong(problem))?);
            Ok(())
        })?;
    match items.is_empty() {
        true => Err(unusable!("{} holds no pair: give at least one", paths.join(", "))),
        false => Ok(FromFiles { items, notes: left_out.note().into_iter().collect() }),
    }
}

/// A behaviour for which pairs are generated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PairTask {
    /// Random words, then one of them again: what followed it comes next. In the corrupt prompt something else followed it.
    Induction,
    /// "When A and B went to the shop, B gave a book to": A. In the corrupt prompt it is A who gives.
    IndirectObject,
    /// "The war lasted from the year 1732 to the year 17": a year that is later. In the corrupt prompt it begins in 1701.
    GreaterThan,
}

impl PairTask {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Induction, Self::IndirectObject, Self::GreaterThan];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Induction => "induction",
            Self::IndirectObject => "indirect_object",
            Self::GreaterThan => "greater_than",
        }
    }
}

/// First names, of which those that are one token are taken.
const NAMES: [&str; 24] = [
    "Mary", "John", "Anna", "Peter", "Sarah", "David", "Emma", "Tom", "Paul", "Alice", "James", "Kate", "Mark",
    "Laura", "Jack", "Jane", "Robert", "Lisa", "Daniel", "Amy", "George", "Rose", "Henry", "Susan",
];
const PLACES: [&str; 6] = ["shop", "school", "park", "station", "library", "garden"];
const OBJECTS: [&str; 6] = ["book", "drink", "ring", "letter", "key", "ball"];
const EVENTS: [&str; 6] = ["war", "project", "reign", "voyage", "trial", "siege"];

/// Words of a prompt of induction before the one that comes again; chosen by us.
const WORDS: usize = 12;
/// Words that are looked for; more tell nothing new. Chosen by us.
const ENOUGH: usize = 400;
/// Draws for a pair whose words turn out as something else in their sentence; chosen by us.
const DRAWS: usize = 100;

/// Words that are one token each, as they are written, and what is put before each of them.
struct Words {
    texts: Vec<String>,
    before: &'static str,
}

/// Generates pairs of a behaviour.
///
/// # Errors
/// If the tokenizer has too few words of one token, or there is none for a task of words.
pub fn generate_pairs(
    task: PairTask,
    count: usize,
    seed: u64,
    (tokenizer, vocab): (Option<&Tokenizer>, usize),
) -> Result<Vec<WrittenPair>, DataError> {
    let make: Box<dyn Fn(&mut ChaCha8Rng) -> WrittenPair> = match (task, tokenizer) {
        (PairTask::Induction, None) => Box::new(move |rng| {
            let ids: Vec<u32> = (0..vocab as u32).collect();
            induction(&some(&ids, WORDS, rng), |ids| Prompt::Ids(ids.to_vec()), rng)
        }),
        (_, None) => return Err(unusable!("{} is made of words, and the model has no tokenizer", task.name())),
        (PairTask::Induction, Some(tokenizer)) => {
            let words = words(tokenizer, &[], WORDS)?;
            Box::new(move |rng| {
                let chosen: Vec<&str> = some(&words.texts.iter().map(String::as_str).collect::<Vec<_>>(), WORDS, rng);
                induction(&chosen, |words| Prompt::Text(words.concat()), rng)
            })
        }
        (PairTask::IndirectObject, Some(tokenizer)) => {
            let words = words(tokenizer, &NAMES, 2)?;
            Box::new(move |rng| indirect_object(&words, rng))
        }
        (PairTask::GreaterThan, Some(tokenizer)) => {
            let digits = digits(tokenizer)?;
            Box::new(move |rng| greater_than(digits, rng))
        }
    };
    if tokenizer.is_none() && vocab < WORDS {
        return Err(unusable!("{} needs {WORDS} ids, and the model knows {vocab}", task.name()));
    }
    let one = |at: usize| {
        let mut rng = generator(seed, at as u64);
        let fits = |pair: &WrittenPair| pair.ids(tokenizer, vocab).is_ok();
        (0..DRAWS).map(|_| make(&mut rng)).find(fits).ok_or_else(|| {
            unusable!("the tokenizer writes the words of {} with more than one token in their sentence", task.name())
        })
    };
    (0..count).map(one).collect()
}

/// Different words, one of which comes again.
fn induction<T: Copy>(words: &[T], written: impl Fn(&[T]) -> Prompt, rng: &mut ChaCha8Rng) -> WrittenPair {
    let last = words.len() - 1;
    let at = rng.random_range(0..last - 2);
    // What follows the word changes places with what follows two words on.
    let other = at + 3.min(last - at);
    let mut clean = words.to_vec();
    clean.push(words[at]);
    let mut corrupt = clean.clone();
    corrupt.swap(at + 1, other);
    let one = |at: usize| written(&words[at..=at]);
    WrittenPair { right: one(at + 1), wrong: one(other), clean: written(&clean), corrupt: written(&corrupt) }
}

fn indirect_object(Words { texts, before }: &Words, rng: &mut ChaCha8Rng) -> WrittenPair {
    let names = some(&texts.iter().map(String::as_str).collect::<Vec<_>>(), 2, rng);
    let [place, object] = [PLACES, OBJECTS].map(|all| all[rng.random_range(0..all.len())]);
    let (a, b) = (names[0], names[1]);
    let prompt = |first: &str, second: &str, giver: &str| {
        let both = format!("When{before}{first} and{before}{second} went to the {place},");
        Prompt::Text(format!("{both}{before}{giver} gave a {object} to{before}"))
    };
    // Who is named first tells nothing.
    let (first, second) = if rng.random::<bool>() { (a, b) } else { (b, a) };
    let text = |name: &str| Prompt::Text(name.to_owned());
    let [clean, corrupt] = [b, a].map(|giver| prompt(first, second, giver));
    WrittenPair { clean, corrupt, right: text(a), wrong: text(b) }
}

/// Digits of a year that are one token: two or one.
fn greater_than(digits: usize, rng: &mut ChaCha8Rng) -> WrittenPair {
    let event = EVENTS[rng.random_range(0..EVENTS.len())];
    let most = 10usize.pow(digits as u32);
    let first = rng.random_range(2 * most / 10..most - most / 10);
    let [right, wrong] = [rng.random_range(first + 1..most), rng.random_range(0..first)];
    // A year whose last digit is no part of the answer ends in 2.
    let rest = if digits == 1 { "2" } else { "" };
    let number = |value: usize| format!("{value:0digits$}");
    let prompt = |value: usize| {
        Prompt::Text(format!("The {event} lasted from the year 17{}{rest} to the year 17", number(value)))
    };
    let answer = |value: usize| Prompt::Text(number(value));
    WrittenPair { clean: prompt(first), corrupt: prompt(digits - 1), right: answer(right), wrong: answer(wrong) }
}

/// Whether a word behind a text is one token more.
fn is_one_token(tokenizer: &Tokenizer, text: &str, word: &str) -> bool {
    let ids = |text: &str| tokenizer.encode(text).unwrap_or_default();
    let (without, with) = (ids(text), ids(&format!("{text}{word}")));
    with.len() == without.len() + 1 && with.starts_with(&without)
}

/// How many digits of a year are one token.
fn digits(tokenizer: &Tokenizer) -> Result<usize, DataError> {
    let one = |digits: usize| {
        let numbers = 0..10usize.pow(digits as u32);
        numbers.into_iter().all(|number| is_one_token(tokenizer, "to the year 17", &format!("{number:0digits$}")))
    };
    [2, 1]
        .into_iter()
        .find(|&digits| one(digits))
        .ok_or_else(|| unusable!("greater_than needs a tokenizer in which two digits, or every digit, are one token"))
}

/// Words of one token: of `wanted` where enough of them are, else of the vocabulary, else its letters.
fn words(tokenizer: &Tokenizer, wanted: &[&str], needed: usize) -> Result<Words, DataError> {
    let one = |word: &str| is_one_token(tokenizer, "When", word);
    let texts: Vec<String> = wanted.iter().map(|word| format!(" {word}")).filter(|word| one(word)).collect();
    if texts.len() >= needed.max(1) {
        return Ok(Words { texts, before: "" });
    }
    let vocab = tokenizer.vocab_size() as u64;
    // In an order of their own, so that short and frequent words, which come first, are not all there are.
    let ids = (0..vocab).map(|at| permute(vocab, 1, at) as u32);
    let spoken = ids.clone().map(|id| tokenizer.decode(&[id]).trim().to_owned());
    let is_word = |word: &String| word.len() > 2 && word.bytes().all(|byte| byte.is_ascii_lowercase());
    let found = spoken.filter(is_word).map(|word| format!(" {word}")).filter(|word| one(word));
    let mut texts: Vec<String> = found.take(ENOUGH).collect();
    texts.sort();
    texts.dedup();
    if texts.len() >= needed {
        return Ok(Words { texts, before: "" });
    }
    let letters = ('a'..='z').map(String::from).filter(|letter| is_one_token(tokenizer, "When ", letter));
    let texts: Vec<String> = letters.collect();
    match texts.len() >= needed {
        true => Ok(Words { texts, before: " " }),
        false => Err(unusable!("the tokenizer has too few words of one token ({} of {needed})", texts.len())),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn generated_pairs_have_one_length_and_answers_of_one_token() {
        let bytes = Tokenizer::bytes();
        for task in PairTask::ALL {
            let pairs = generate_pairs(task, 20, 3, (Some(&bytes), 258)).unwrap();
            for pair in &pairs {
                let ids = pair.ids(Some(&bytes), 258).unwrap();
                let differ = ids.clean.iter().zip(&ids.corrupt).filter(|(a, b)| a != b).count();
                assert!((1..=2).contains(&differ), "{pair:?}");
                assert_eq!(generate_pairs(task, 20, 3, (Some(&bytes), 258)).unwrap(), pairs);
            }
            assert_ne!(generate_pairs(task, 20, 4, (Some(&bytes), 258)).unwrap(), pairs);
        }
    }

    #[test]
    fn the_answers_are_those_of_the_behaviour() {
        let bytes = Tokenizer::bytes();
        let text = |prompt: &Prompt| match prompt {
            Prompt::Text(text) => text.clone(),
            Prompt::Ids(ids) => panic!("{ids:?}"),
        };
        for pair in generate_pairs(PairTask::Induction, 20, 1, (None, 40)).unwrap() {
            let ids = pair.ids(None, 40).unwrap();
            let follows = |prompt: &[u32]| {
                let last = prompt[prompt.len() - 1];
                prompt[prompt.iter().position(|&id| id == last).unwrap() + 1]
            };
            assert_eq!([follows(&ids.clean), follows(&ids.corrupt)], [ids.right, ids.wrong]);
        }
        for pair in generate_pairs(PairTask::IndirectObject, 20, 1, (Some(&bytes), 258)).unwrap() {
            let giver = |prompt: &Prompt| text(prompt).split(", ").nth(1).unwrap()[..1].to_owned();
            assert_eq!([giver(&pair.clean), giver(&pair.corrupt)], [text(&pair.wrong), text(&pair.right)]);
        }
        for pair in generate_pairs(PairTask::GreaterThan, 20, 1, (Some(&bytes), 258)).unwrap() {
            let first = text(&pair.clean).split("year 17").nth(1).unwrap()[..1].to_owned();
            assert!(text(&pair.right) > first && text(&pair.wrong) < first, "{pair:?}");
        }
    }

    #[test]
    fn pairs_of_files_are_refused_with_their_line() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pairs.jsonl");
        let paths = [file.display().to_string()];
        let bytes = Tokenizer::bytes();
        let good = r#"{"clean": "ab a", "corrupt": "cb a", "right": "b", "wrong": "c"}"#;
        for (line, words) in [
            (r#"{"clean": "ab", "corrupt": "a", "right": "b", "wrong": "c"}"#, "2 tokens and its corrupt one 1"),
            (r#"{"clean": "ab", "corrupt": "ac", "right": "b", "wrong": "bc"}"#, "begin with the same token"),
            (r#"{"clean": "ab", "corrupt": "ac", "right": "b"}"#, "no field \"wrong\""),
            (r#"{"clean": 1.5, "corrupt": "ac", "right": "b", "wrong": "c"}"#, "\"clean\" holds 1.5"),
            (r#"{"clean": [1, 999], "corrupt": [1, 2], "right": 3, "wrong": 4}"#, "id 999 is not below"),
            ("[1", "column"),
        ] {
            std::fs::write(&file, format!("{good}\n{line}\n")).unwrap();
            let told = read_prompt_pairs(&paths, Some(&bytes), 258).err().unwrap().to_string();
            assert!(told.contains("pairs.jsonl:2: ") && told.contains(words), "{told}");
        }
        std::fs::write(&file, format!("{good}\n")).unwrap();
        let read = read_prompt_pairs(&paths, Some(&bytes), 258).unwrap().items;
        assert_eq!([read[0].right, read[0].wrong], [98, 99]);
        assert!(read_prompt_pairs(&paths, None, 258).err().unwrap().to_string().contains("no tokenizer"));
    }
}

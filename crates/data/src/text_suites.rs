//! Questions about long texts under the settings of published suites: RULER's synthetic tasks (`ruler.rs`) and stories in the
//! manner of BABILong (`babilong.rs`). The wording is ours; what is asked, how long texts are and how answers are scored is
//! theirs.
//!
//! A question is a function of (seed, index). Its length is counted in the tokens of a tokenizer, the tokens that are to be
//! generated included.

mod babilong;
mod ruler;
mod source;

use std::ops::RangeInclusive;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::random::generator;
use crate::{DataError, Tokenizer};

pub use babilong::BabiTask;
pub use ruler::RulerTask;
pub use source::{BabilongLikeConfig, RulerConfig};

/// A question about a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextQuestion {
    /// Instruction, text and question, up to where the answer begins.
    pub prompt: String,
    /// What a model that knows it writes next.
    pub answer: String,
    /// Tokens that are generated at most.
    pub generate: usize,
    scoring: Scoring,
}

/// How what a model writes is scored.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Scoring {
    /// The share of these that occur in it, whatever the case (RULER).
    Found(Vec<String>),
    /// 1 if of these labels, those of the question left out, the first sentence has one alone, and that is the answer (BABILong).
    Label { labels: Vec<String>, question: String, target: String },
}

impl TextQuestion {
    /// The score of what a model wrote, from 0 to 1.
    pub fn score(&self, written: &str) -> f64 {
        let written = written.to_lowercase();
        match &self.scoring {
            Scoring::Found(references) => {
                let found = references.iter().filter(|reference| written.contains(&reference.to_lowercase())).count();
                found as f64 / references.len().max(1) as f64
            }
            Scoring::Label { labels, question, target } => {
                let first = written.trim_start().split(['.', '\n']).next().unwrap_or_default();
                let question = question.to_lowercase();
                let mut said = labels.iter().filter(|label| !question.contains(*label) && first.contains(*label));
                let only = said.next().filter(|_| said.next().is_none());
                f64::from(u8::from(only == Some(target)))
            }
        }
    }
}

/// A task of either suite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum TextTask {
    /// RULER's.
    Ruler(RulerTask),
    /// BABILong's.
    Babi(BabiTask),
}

impl TextTask {
    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ruler(task) => task.name(),
            Self::Babi(task) => task.name(),
        }
    }

    /// What its scores are, in results.
    pub fn measure(self) -> &'static str {
        match self {
            Self::Ruler(_) => "references_found",
            Self::Babi(_) => "labels_right",
        }
    }
}

/// Makes questions.
#[derive(Clone)]
pub struct TextQuestions {
    /// Counts the tokens.
    pub tokenizer: Tokenizer,
    /// Sentences of a text to hide things in; empty takes generated ones.
    pub sentences: Vec<String>,
    /// Decides every question.
    pub seed: u64,
}

impl TextQuestions {
    /// Question number `index` of a task with texts of at most `length` tokens, and not much less.
    ///
    /// # Errors
    /// If the shortest text is longer, or cannot be tokenized.
    pub fn make(&self, task: TextTask, length: usize, index: u64) -> Result<TextQuestion, DataError> {
        self.drawn(task, length, &generator(self.seed, index))
    }

    /// The question that this generator draws.
    fn drawn(&self, task: TextTask, length: usize, rng: &ChaCha8Rng) -> Result<TextQuestion, DataError> {
        match task {
            TextTask::Ruler(task) => {
                let short = length < ruler::SHORT;
                self.longest(task.name(), length, task.units(), |units| {
                    ruler::question(task, units, short, &mut rng.clone(), &self.sentences)
                })
            }
            TextTask::Babi(task) => {
                // Tokenizers with short tokens have room for fewer facts.
                let mut facts = (length / 8).max(babilong::FEWEST);
                loop {
                    let story = babilong::story(task, facts, &mut rng.clone());
                    let made = self.longest(task.name(), length, 0..=usize::MAX, |units| {
                        babilong::question(&story, units, &mut rng.clone(), &self.sentences)
                    });
                    match made {
                        Err(_) if facts > babilong::FEWEST => facts = (facts * 2 / 3).max(babilong::FEWEST),
                        made => return made,
                    }
                }
            }
        }
    }

    /// The question with the most units of haystack that has at most `length` tokens.
    fn longest(
        &self,
        name: &str,
        length: usize,
        units: RangeInclusive<usize>,
        make: impl Fn(usize) -> TextQuestion,
    ) -> Result<TextQuestion, DataError> {
        let tokens = |question: &TextQuestion| -> Result<usize, DataError> {
            Ok(self.tokenizer.encode(&question.prompt)?.len() + question.generate)
        };
        let (least, most) = units.into_inner();
        let shortest = make(least);
        let needed = tokens(&shortest)?;
        if needed > length {
            return Err(unusable!(
                "the shortest text of {name} has {needed} tokens, more than there is room for ({length}): give more room, or a \
                 tokenizer with longer tokens"
            ));
        }
        // Doubled until it is too long, then bisected.
        let (mut fits, mut best, mut step) = (least, shortest, 1usize);
        let mut too_many = loop {
            let next = fits.saturating_add(step).min(most);
            if next == fits {
                return Ok(best);
            }
            let question = make(next);
            if tokens(&question)? > length {
                break next;
            }
            (fits, best, step) = (next, question, step.saturating_mul(2));
        };
        while too_many - fits > 1 {
            let middle = fits + (too_many - fits) / 2;
            let question = make(middle);
            match tokens(&question)? <= length {
                true => (fits, best) = (middle, question),
                false => too_many = middle,
            }
        }
        Ok(best)
    }
}

/// The sentences of a text, to hide things in.
pub fn sentences(text: &str) -> Vec<String> {
    let ends = |sign: char| matches!(sign, '.' | '!' | '?');
    let whole = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let pieces = whole.split_inclusive(ends).map(str::trim);
    pieces.filter(|sentence| sentence.len() > 1).map(str::to_owned).collect()
}

/// A sentence of the background.
fn background(at: usize, first: usize, sentences: &[String], rng: &mut ChaCha8Rng) -> String {
    match sentences.len() {
        0 => crate::long_context::filler_sentence(|n| rng.random_range(0..n)),
        count => sentences[(first + at) % count].clone(),
    }
}

/// A pronounceable word for each number, another one for another number.
fn word(mut number: usize) -> String {
    const CONSONANTS: &[u8] = b"bdfgklmnprstvz";
    const VOWELS: &[u8] = b"aeiou";
    let mut word = String::new();
    for syllable in 0.. {
        let of = number % (CONSONANTS.len() * VOWELS.len());
        word.push(CONSONANTS[of / VOWELS.len()] as char);
        word.push(VOWELS[of % VOWELS.len()] as char);
        number /= CONSONANTS.len() * VOWELS.len();
        if number == 0 && syllable > 0 {
            break;
        }
        number = number.saturating_sub(usize::from(syllable > 0));
    }
    word
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;

    use super::*;

    fn questions(seed: u64) -> TextQuestions {
        TextQuestions { tokenizer: Tokenizer::bytes(), sentences: Vec::new(), seed }
    }

    fn all() -> Vec<TextTask> {
        let ruler = RulerTask::ALL.into_iter().map(TextTask::Ruler);
        ruler.chain(BabiTask::ALL.into_iter().map(TextTask::Babi)).collect()
    }

    #[test]
    fn texts_are_as_long_as_asked_and_answers_score_fully() {
        for task in all() {
            for length in [2500, 12_000] {
                for index in 0..4 {
                    let question = questions(3).make(task, length, index).unwrap();
                    let found = question.prompt.len() + question.generate;
                    assert!(found <= length && found * 10 > length * 7, "{}: {found} of {length}", task.name());
                    assert_eq!(question.score(&question.answer), 1.0, "{}: {}", task.name(), question.answer);
                    assert_eq!(question.score("nothing"), 0.0, "{}", task.name());
                    assert_eq!(question, questions(3).make(task, length, index).unwrap());
                    assert_ne!(question, questions(4).make(task, length, index).unwrap());
                }
            }
        }
    }

    #[test]
    fn words_differ_and_texts_have_their_sentences() {
        let words: BTreeSet<String> = (0..30_000).map(word).collect();
        assert_eq!(words.len(), 30_000);
        assert_eq!(sentences("One  is.\nIs two? no"), ["One is.", "Is two?", "no"]);
        let own = TextQuestions { sentences: sentences("The cat sat. It slept."), ..questions(1) };
        let question = own.make(TextTask::Ruler(RulerTask::NiahMultivalue), 2000, 0).unwrap();
        assert!(question.prompt.contains("The cat sat. It slept."), "{}", question.prompt);
    }

    #[test]
    fn what_has_no_room_is_refused() {
        let problem = questions(0).make(TextTask::Ruler(RulerTask::Vt), 200, 0).unwrap_err().to_string();
        assert!(problem.contains("shortest text of vt"), "{problem}");
    }
}

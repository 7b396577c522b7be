//! `[data.ruler]` and `[data.babilong_like]`: questions about long texts as rows, of which the answer is predicted.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use polyhead_models::IGNORE;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{BabiTask, RulerTask, TextQuestions, TextTask, sentences};
use crate::batches::{LoaderOptions, Order, Sample, Samples, first_rows};
use crate::error::At;
use crate::problem::{Problem, within};
use crate::random::mix;
use crate::synthetic::{EPOCH, Side};
use crate::texts::{Documents, TextDocument, held};
use crate::{Data, DataError, Loader, Opened, Opening, Source, Tokenizer};

/// `[data.ruler]`. A row has `training.seq_len` tokens at most: a text with a question, and its answer, which is what is predicted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RulerConfig {
    /// Which task: "niah_single_1", "niah_multikey_2", "niah_multikey_3", "niah_multivalue", "niah_multiquery", "vt", "cwe" or
    /// "fwe".
    pub task: RulerTask,
    /// Tokens of the texts to test on, a set each. Default: training.seq_len.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub test: Vec<usize>,
    /// Rows of each set to test on. Default: 500, as published.
    #[serde(default = "five_hundred")]
    pub test_rows: u64,
    /// A text file whose sentences multivalue and multiquery hide needles in. Default: generated sentences.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub background: Option<PathBuf>,
}

/// `[data.babilong_like]`. A row has `training.seq_len` tokens at most: a story in a background with a question, and its answer,
/// which is what is predicted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BabilongLikeConfig {
    /// Which task: "qa1" to "qa5".
    pub task: BabiTask,
    /// Tokens of the texts to test on, a set each. Default: training.seq_len.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub test: Vec<usize>,
    /// Rows of each set to test on. Default: 100, as published.
    #[serde(default = "hundred")]
    pub test_rows: u64,
    /// A text file whose sentences are the background. Default: generated sentences.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub background: Option<PathBuf>,
}

fn five_hundred() -> u64 {
    500
}

fn hundred() -> u64 {
    100
}

/// What both sources are made of.
#[derive(Clone)]
struct Texts {
    task: TextTask,
    test: Vec<usize>,
    test_rows: u64,
    background: Option<PathBuf>,
}

macro_rules! source {
    ($Config:ident, $Task:ident) => {
        impl $Config {
            fn texts(&self) -> Texts {
                let Self { task, test, test_rows, background } = self.clone();
                Texts { task: TextTask::$Task(task), test, test_rows, background }
            }
        }

        impl Source for $Config {
            fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
                self.texts().validate()
            }

            fn paths(&self) -> Vec<String> {
                self.background.iter().map(|path| path.display().to_string()).collect()
            }

            fn longest_row(&self, seq_len: usize) -> usize {
                self.test.iter().copied().fold(seq_len, usize::max)
            }

            fn documents(&self, _project_root: &Path) -> Result<Option<Documents>, DataError> {
                self.texts().documents().map(Some)
            }

            fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
                self.texts().open(opening)
            }
        }
    };
}
source!(RulerConfig, Ruler);
source!(BabilongLikeConfig, Babi);

impl Texts {
    fn validate(&self) -> Result<(), Problem> {
        within("test_rows", self.test_rows, 1..=EPOCH)?;
        self.test.iter().try_for_each(|&length| within("test", length, 1..=1 << 20))
    }

    fn questions(&self, tokenizer: &Tokenizer, seed: u64) -> Result<TextQuestions, DataError> {
        let sentences = match &self.background {
            None => Vec::new(),
            Some(path) => sentences(&std::fs::read_to_string(path).at(path)?),
        };
        Ok(TextQuestions { tokenizer: tokenizer.clone(), sentences, seed })
    }

    /// Questions with their answers, for training a tokenizer on.
    fn documents(&self) -> Result<Documents, DataError> {
        const TEXTS: u64 = 200;
        let questions = self.questions(&Tokenizer::bytes(), 0)?;
        let text = |index: u64| {
            let question = questions.make(self.task, 6000, index)?;
            let name = format!("{} {index}", self.task.name());
            Ok(TextDocument { name, text: format!("{}{}", question.prompt, question.answer) })
        };
        let texts = (0..TEXTS).map(text).collect::<Result<Vec<_>, DataError>>()?;
        Ok(Documents::counted("generated question", self.task.name(), held(texts)))
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        let Opening { name, tokenizer, options, .. } = opening;
        let lengths = if self.test.is_empty() { vec![options.seq_len] } else { self.test.clone() };
        let questions = self.questions(tokenizer, options.seed)?;
        let rows = |lengths: Vec<usize>, rows: u64, side: Side| TextRows {
            task: self.task,
            questions: questions.clone(),
            lengths,
            rows,
            side,
        };
        let train = rows(vec![options.seq_len], EPOCH, Side::Train);
        let test = rows(lengths.clone(), self.test_rows, Side::Validation(self.test_rows));
        // What has no room is told before anything is trained.
        train.sample(0, 0)?;
        (0..lengths.len() as u64).try_for_each(|set| test.sample(0, set * self.test_rows).map(drop))?;
        let most = options.tracking.map_or(0, |tracking| tracking.texts as u64);
        let (bytes, note) = tokenizer.token_bytes_of_sample();
        let loader = |rows, order| Loader::new(Arc::new(rows), bytes.clone(), LoaderOptions::of(options, order));
        Ok(Data::Tokens(Box::new(Opened {
            tracking: first_rows(&rows(vec![options.seq_len], most, Side::Tracking(most)), most)?,
            train: loader(train, Order::Endless),
            validation: loader(test, Order::Once),
            vocab_size: tokenizer.vocab_size(),
            tokenizer: Some(tokenizer.clone()),
            description: format!(
                "generated: {name}, {} at {} tokens, tested at {lengths:?}",
                self.task.name(),
                options.seq_len
            ),
            notes: note.into_iter().collect(),
            text_hash: self.background.as_ref().map(|_| {
                let all = questions.sentences.join("\n");
                blake3::hash(all.as_bytes()).to_hex().to_string()
            }),
            floor: None,
        })))
    }
}

/// Rows of one question each: sets of `rows`, by the length of their texts.
struct TextRows {
    task: TextTask,
    questions: TextQuestions,
    lengths: Vec<usize>,
    rows: u64,
    side: Side,
}

impl Samples for TextRows {
    fn per_epoch(&self) -> u64 {
        self.rows.saturating_mul(self.lengths.len() as u64)
    }

    fn parts(&self) -> Vec<(String, u64)> {
        self.lengths.iter().map(|length| (format!("{length} tokens"), self.rows)).collect()
    }

    fn sample(&self, _epoch: u64, index: u64) -> Result<Sample, DataError> {
        let set = index / self.rows.max(1);
        let length = self.lengths[set as usize % self.lengths.len()];
        let rng = self.side.rng(mix(self.questions.seed, set), index % self.rows.max(1));
        let question = self.questions.drawn(self.task, length, &rng)?;
        let mut tokens = self.questions.tokenizer.encode(&question.prompt)?;
        let answer = self.questions.tokenizer.encode(&question.answer)?;
        let first = tokens.len().saturating_sub(1);
        let mut targets = vec![IGNORE; first];
        targets.extend(answer.iter().map(|&id| i64::from(id)));
        tokens.extend(answer);
        tokens.truncate(length);
        tokens.resize(length, self.questions.tokenizer.pad());
        targets.resize(length, IGNORE);
        Ok(Sample { tokens, targets, ..Sample::default() })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::DataConfig;

    #[test]
    fn rows_predict_their_answers() {
        for (json, task) in [
            (r#"{"ruler":{"task":"niah_single_1","test":[512,700],"test_rows":3}}"#, "niah"),
            (r#"{"babilong_like":{"task":"qa1","test":[600],"test_rows":3}}"#, "qa1"),
        ] {
            let config: DataConfig = serde_json::from_str(json).unwrap();
            let tokenizer = Tokenizer::bytes();
            let options = crate::tests::options(512, 2, 7);
            let opened = config.open_tokens(&tokenizer, &options, &mut |_, _| {}).unwrap();
            let row = opened.train.batch(3).unwrap().row(0);
            let asked: Vec<usize> = (0..512).filter(|&at| row.targets[at] != IGNORE).collect();
            assert!(asked.windows(2).all(|pair| pair[1] == pair[0] + 1), "{task}: one answer");
            let answer = &row.tokens[asked[0] + 1..=asked[asked.len() - 1] + 1];
            assert!(row.targets[asked[0]..].iter().zip(answer).all(|(&target, &id)| target == i64::from(id)), "{task}");
            let names: Vec<String> = opened.validation.parts().into_iter().map(|(name, _)| name).collect();
            assert_eq!(names[0], if task == "qa1" { "600 tokens" } else { "512 tokens" });
        }
        // Another background is other data.
        let folder = crate::testing::Folder::new();
        let hash = |text: &str| {
            let file = folder.write("background.txt", text);
            let json = serde_json::json!({ "babilong_like": { "task": "qa1", "test_rows": 1, "background": file } });
            let config: DataConfig = serde_json::from_value(json).unwrap();
            let options = crate::tests::options(700, 2, 7);
            config.open_tokens(&Tokenizer::bytes(), &options, &mut |_, _| {}).unwrap().text_hash
        };
        let first = hash("It rained. It was cold.");
        assert!(first.is_some() && first == hash("It rained. It was cold.") && first != hash("It rained. It was hot."));
        let config: DataConfig = serde_json::from_str(r#"{"ruler":{"task":"vt"}}"#).unwrap();
        let problem = config.open_tokens(&Tokenizer::bytes(), &crate::tests::options(200, 2, 7), &mut |_, _| {});
        assert!(problem.err().unwrap().to_string().contains("shortest text of vt"));
    }
}

//! Questions about texts of any length, with one right answer: for training (`[data.long_context]`) and for telling how far
//! a model can look back (`polyhead eval --task`). They need a tokenizer, a chat template and a seed, and no file.
//!
//! A problem is a conversation: a text and a question, and the answer. Its length is counted in tokens, everything
//! included. Problems are pure functions of (seed, stream).

mod tasks;
mod words;

use std::path::Path;
use std::sync::Arc;

use polyhead_models::Role;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::batches::{LoaderOptions, Order, Sample, Samples, first_rows};
use crate::chat::{self, ChatTemplate, ChatTokens, Conversation, Learn, chat_template, tokenize};
use crate::problem::{Problem, require};
use crate::synthetic::Side;
use crate::texts::{Documents, TextDocument, held};
use crate::{Data, DataError, Loader, Opened, Opening, Source, Tokenizer};

pub use crate::random::generator;
use tasks::Facts;
pub use tasks::{EIGHT, LongTask};

/// A sentence that says nothing; `draw` chooses below a number.
pub(crate) fn filler_sentence(draw: impl FnMut(usize) -> usize) -> String {
    words::filler(draw)
}

/// `[data.long_context]`: questions about texts that are as long as a row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LongContextConfig {
    /// What is asked, one after the other. Default: all of key_value, needles_multi, variable_tracking, common_words,
    /// multi_hop.
    pub tasks: Vec<LongTask>,
    /// Questions about each text, one after the other, where the task knows as many and there is room. Default: 1.
    pub questions: usize,
    /// The fewest and the most keys that a text of key_value or needles_multi has, both 2 to 8; how many it is is drawn
    /// for each text. Models learn to look up sooner from texts with few. Default: [8, 8].
    pub keys: [usize; 2],
    /// The chat template, as in data.chat. Default: "plain".
    pub template: String,
    /// What is learned, as in data.chat: "assistant" (default), "last" or "all".
    pub learn: Learn,
}

impl Default for LongContextConfig {
    fn default() -> Self {
        Self {
            tasks: LongTask::ALL.to_vec(),
            questions: 1,
            keys: EIGHT,
            template: "plain".into(),
            learn: Learn::Assistant,
        }
    }
}

impl Source for LongContextConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        require(!self.tasks.is_empty(), "tasks", || "tasks is empty: name at least one".into())?;
        let [fewest, most] = self.keys;
        require(2 <= fewest && fewest <= most && most <= 8, "keys", || {
            format!("keys ([{fewest}, {most}]) must be 2 to 8, the fewest first")
        })
    }

    fn documents(&self, _project_root: &Path) -> Result<Option<Documents>, DataError> {
        Ok(Some(Documents::counted("generated conversation", "long_context", held(texts(self)?))))
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        let Opening { tokenizer, options, .. } = opening;
        let rows = |side| LongContext::new(self, tokenizer, options.seq_len, (options.seed, side));
        let (train, held_out) = (rows(Side::Train)?, rows(Side::Validation(options.validation_samples.max(1)))?);
        let template = &train.template;
        let markers = chat::note(template, tokenizer, "data.long_context.template", &self.template)?;
        let other = chat::other_than_own(template, tokenizer, "data.long_context.template", &self.template);
        let with_template = tokenizer.clone().with_chat_template(template.source().to_owned());
        let most = options.tracking.map_or(0, |tracking| tracking.texts as u64);
        let (bytes, note) = tokenizer.token_bytes_of_sample();
        let loader = |rows, order| Loader::new(Arc::new(rows), bytes.clone(), LoaderOptions::of(options, order));
        let tasks: Vec<&str> = self.tasks.iter().map(|task| task.name()).collect();
        Ok(Data::Tokens(Box::new(Opened {
            train: loader(train, Order::Endless),
            validation: loader(held_out, Order::Once),
            tracking: first_rows(&rows(Side::Tracking(most))?, most)?,
            vocab_size: tokenizer.vocab_size(),
            tokenizer: Some(with_template),
            description: format!(
                "generated: questions about texts of up to {} tokens ({})",
                options.seq_len,
                tasks.join(", ")
            ),
            notes: other.into_iter().chain(markers).chain(note).collect(),
            text_hash: None,
            floor: None,
        })))
    }
}

/// A problem in tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LongProblem {
    /// Text, question and answer.
    pub tokens: ChatTokens,
    /// Where in the tokens the first answer stands, without what ends the turn.
    pub answer: std::ops::Range<usize>,
    /// The conversation as text: what is asked, and the answer, turn by turn.
    pub text: Vec<[String; 2]>,
}

/// Makes problems.
pub struct Problems<'a> {
    /// Counts the tokens.
    pub tokenizer: &'a Tokenizer,
    /// Writes around what is said.
    pub template: &'a ChatTemplate,
    /// Which tokens are learned.
    pub learn: Learn,
    /// Questions in a conversation, at most.
    pub questions: usize,
    /// The fewest and the most keys of a text that has any; [`EIGHT`] of them is what models are compared on.
    pub keys: [usize; 2],
}

impl Problems<'_> {
    /// A problem of at most `length` tokens, and not much less. `depth`, 0 to 1, says where in the text stands what is asked
    /// for: 0 at its beginning.
    ///
    /// # Errors
    /// If the facts alone are longer, or the template does not allow such a conversation.
    pub fn make(
        &self,
        task: LongTask,
        length: usize,
        depth: f64,
        rng: &mut ChaCha8Rng,
    ) -> Result<LongProblem, DataError> {
        let facts = task.facts(self.keys, rng);
        // About as many pieces of filler as fit; then fewer, until they do.
        let probe: String = (0..16).map(|index| facts.filler.piece(index, rng) + " ").collect();
        let per_piece = (self.tokenizer.encode(&probe)?.len() as f64 / 16.0).max(1.0);
        let mut count = (length as f64 / per_piece * 1.1) as usize;
        let mut questions = self.questions.clamp(1, facts.questions.len());
        loop {
            let problem = self.tokens(&facts, questions, &place(&facts, count, depth, &mut rng.clone()))?;
            let over = problem.tokens.tokens.len().saturating_sub(length);
            if over == 0 && count >= facts.filler.least() {
                return Ok(problem);
            }
            if count <= facts.filler.least() && questions > 1 {
                questions -= 1;
                continue;
            }
            if count <= facts.filler.least() {
                return Err(unusable!(
                    "the shortest problem of {} has {} tokens, more than there is room for ({length}): give more room, or a \
                     tokenizer with longer tokens",
                    task.name(),
                    problem.tokens.tokens.len()
                ));
            }
            count -= ((over as f64 / per_piece) as usize).clamp(1, count - facts.filler.least());
        }
    }

    fn tokens(&self, facts: &Facts, questions: usize, text: &str) -> Result<LongProblem, DataError> {
        let mut turns: Vec<[String; 2]> = facts.questions.iter().take(questions).cloned().collect();
        turns[0][0] = format!("{text} {}", turns[0][0]);
        let turn = |[question, answer]: &[String; 2]| {
            [json!({ "role": "user", "content": question }), json!({ "role": "assistant", "content": answer })]
        };
        let chat = Conversation { messages: turns.iter().flat_map(turn).collect(), tools: None };
        let mut texts = tokenize(&chat, self.learn, self.template, self.tokenizer)
            .map_err(|problem| unusable!("chat template: {problem}"))?;
        let Some(tokens) = texts.pop().filter(|_| texts.is_empty()) else {
            return Err(unusable!(
                "data.long_context.questions ({}): the chat template renders answers otherwise once more questions follow, so \
                 that they cannot be learned in one text; set questions = 1, or template = \"plain\"",
                self.questions
            ));
        };
        let said = |at: usize| tokens.roles[at] == Role::Assistant;
        let start = (0..tokens.tokens.len()).find(|&at| said(at)).unwrap_or(0);
        let whole = |end: &usize| self.tokenizer.decode(&tokens.tokens[start..*end]).trim() == turns[0][1];
        let end = (start..=tokens.tokens.len()).find(whole).unwrap_or(tokens.tokens.len());
        Ok(LongProblem { tokens, answer: start..end, text: turns })
    }
}

/// The text with `count` pieces of filler. What is asked for stands at `depth`; each other group somewhere, in its order.
fn place(facts: &Facts, count: usize, depth: f64, rng: &mut ChaCha8Rng) -> String {
    // Sentences with where they go, from 0 to 1; equal places keep their order.
    let mut placed: Vec<(f64, String)> = Vec::new();
    for index in 0..count {
        placed.push(((index as f64 + 0.5) / count as f64, facts.filler.piece(index, rng)));
    }
    for group in &facts.others {
        let mut places: Vec<f64> = group.iter().map(|_| rng.random::<f64>()).collect();
        places.sort_by(f64::total_cmp);
        placed.extend(places.into_iter().zip(group.iter().cloned()));
    }
    // A tenth of the text apart, around the depth.
    let apart = 0.1 / facts.asked.len().max(1) as f64;
    let first = (depth - apart * (facts.asked.len() as f64 - 1.0) / 2.0).clamp(0.0, 0.9);
    placed.extend(facts.asked.iter().enumerate().map(|(index, text)| (first + apart * index as f64, text.clone())));
    placed.sort_by(|a, b| a.0.total_cmp(&b.0));
    placed.into_iter().map(|(_, text)| text).collect::<Vec<_>>().join(" ")
}

/// Rows of one problem each, without end.
struct LongContext {
    config: LongContextConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    seq_len: usize,
    seed: u64,
    side: Side,
}

impl LongContext {
    /// Checks that the longest problem fits.
    fn new(
        config: &LongContextConfig,
        tokenizer: &Tokenizer,
        seq_len: usize,
        (seed, side): (u64, Side),
    ) -> Result<Self, DataError> {
        let template = chat_template("data.long_context.template", &config.template, tokenizer)?;
        let (config, tokenizer) = (config.clone(), tokenizer.clone());
        let rows = Self { config, tokenizer, template, seq_len, seed, side };
        for index in 0..rows.config.tasks.len() as u64 {
            rows.problem(index)?;
        }
        Ok(rows)
    }

    fn problem(&self, index: u64) -> Result<LongProblem, DataError> {
        let mut rng = generator(self.seed, self.side.stream(index));
        let task = self.config.tasks[(index % self.config.tasks.len() as u64) as usize];
        let depth = rng.random();
        let LongContextConfig { learn, questions, keys, .. } = self.config;
        let problems = Problems { tokenizer: &self.tokenizer, template: &self.template, learn, questions, keys };
        problems.make(task, self.seq_len, depth, &mut rng)
    }
}

impl Samples for LongContext {
    fn per_epoch(&self) -> u64 {
        self.side.per_epoch()
    }

    fn sample(&self, _epoch: u64, index: u64) -> Result<Sample, DataError> {
        Ok(chat::row([&self.problem(index)?.tokens], self.seq_len, self.tokenizer.pad()))
    }
}

/// Conversations as texts, for training a tokenizer on.
fn texts(config: &LongContextConfig) -> Result<Vec<TextDocument>, DataError> {
    const TEXTS: u64 = 400;
    let tokenizer = Tokenizer::bytes();
    let template = chat_template("data.long_context.template", &config.template, &tokenizer)?;
    let problems =
        Problems { tokenizer: &tokenizer, template: &template, learn: config.learn, questions: 1, keys: EIGHT };
    let text = |index: u64| {
        let task = config.tasks[index as usize % config.tasks.len()];
        let turns = problems.make(task, 1500, 0.5, &mut generator(0, index))?.text;
        let name = format!("{} {index}", task.name());
        // Names of speakers have to become tokens too.
        let text = turns.iter().map(|[asked, answer]| format!("User: {asked}\nAssistant: {answer}\n")).collect();
        Ok(TextDocument { name, text })
    };
    (0..TEXTS).map(text).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use polyhead_models::IGNORE;

    use super::*;

    fn make_with(questions: usize, task: LongTask, length: usize, depth: f64, stream: u64) -> LongProblem {
        let tokenizer = Tokenizer::bytes();
        let template = chat_template("template", "plain", &tokenizer).unwrap();
        let problems =
            Problems { tokenizer: &tokenizer, template: &template, learn: Learn::Assistant, questions, keys: EIGHT };
        problems.make(task, length, depth, &mut generator(7, stream)).unwrap()
    }

    fn make(task: LongTask, length: usize, depth: f64, stream: u64) -> LongProblem {
        make_with(1, task, length, depth, stream)
    }

    #[test]
    fn problems_are_as_long_as_asked_and_a_function_of_seed_and_stream() {
        for task in LongTask::ALL {
            for length in [700, 3000] {
                let problem = make(task, length, 0.5, 3);
                let found = problem.tokens.tokens.len();
                assert!(found <= length && found > length - 60, "{}: {found} of {length}", task.name());
                assert_eq!(problem, make(task, length, 0.5, 3));
                assert_ne!(problem, make(task, length, 0.5, 4));
                let learned = problem.tokens.learned.iter().filter(|&&learned| learned).count();
                // " answer", the token that ends it, a new line.
                let [_, said] = &problem.text[0];
                assert_eq!(learned, 1 + said.len() + 2);
                let answer = &problem.tokens.tokens[problem.answer.clone()];
                assert_eq!(Tokenizer::bytes().decode(answer), format!(" {said}"));
            }
        }
    }

    #[test]
    fn answers_follow_from_the_text_and_stand_at_their_depth() {
        for stream in 0..40 {
            let depth = f64::from(stream as u32 % 5) / 5.0 + 0.1;
            let problem = |task| make(task, 2000, depth, stream).text.remove(0);
            let near = |text: &str, sentence: &str| {
                let at = text.find(sentence).unwrap() as f64 / text.len() as f64;
                assert!((at - depth).abs() < 0.15, "{at} for {depth}: {sentence}");
            };
            let between =
                |text: &str, a: &str, b: &str| text.split_once(a).unwrap().1.split_once(b).unwrap().0.to_owned();

            let [text, answer] = problem(LongTask::KeyValue);
            let key = text.rsplit(' ').next().unwrap().strip_suffix('?').unwrap();
            assert!(answer.starts_with(&format!("{key} ")));
            near(&text, &answer);

            let [text, answer] = problem(LongTask::NeedlesMulti);
            let thing = between(&text, "What is the code of the ", "?");
            assert!(answer.starts_with(&format!("The code of the {thing} is ")));
            near(&text, &answer);
            assert_eq!(text.matches("The code of the ").count(), 8);

            let [text, answer] = problem(LongTask::VariableTracking);
            let value = between(&text, "Which variables are ", "?");
            let mut holding = Vec::new();
            for sentence in text.split("Let ").skip(1) {
                let (name, rest) = sentence.split_once(" be ").unwrap();
                let source = rest.split_once('.').unwrap().0;
                if source == value || holding.contains(&source) {
                    holding.push(name);
                }
            }
            assert_eq!(holding.join(" "), answer);
            near(&text, &format!("be {value}."));

            let [text, answer] = problem(LongTask::CommonWords);
            let list = text.strip_suffix("Which two words are the most common?").unwrap();
            let mut counts = std::collections::BTreeMap::<&str, usize>::new();
            list.split_whitespace().for_each(|word| *counts.entry(word).or_default() += 1);
            let mut ranked: Vec<(&str, usize)> = counts.into_iter().collect();
            ranked.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
            assert!(ranked[1].1 > ranked[2].1, "{ranked:?}");
            let mut two = [ranked[0].0, ranked[1].0];
            two.sort_unstable();
            assert_eq!(two.join(" "), answer);

            let [text, answer] = problem(LongTask::MultiHop);
            let thing = between(&text, "Where is the ", "?");
            let before = text.split_once(&format!(" took the {thing}.")).unwrap().0;
            let who = before.rsplit(' ').next().unwrap();
            let (_, after) = text.split_once(&format!("{who} took the {thing}.")).unwrap();
            let place = between(after, &format!("{who} went to the "), ".");
            assert_eq!(answer, format!("{who} took the {thing}. {who} went to the {place}."));
        }
    }

    #[test]
    fn further_questions_are_answered_in_turns_of_their_own() {
        let one = make_with(1, LongTask::MultiHop, 1500, 0.5, 3);
        let four = make_with(9, LongTask::MultiHop, 1500, 0.5, 3);
        assert_eq!((one.text.len(), four.text.len()), (1, 4));
        assert_eq!(make_with(9, LongTask::MultiHop, 420, 0.5, 3).text.len(), 2, "as many as there is room for");
        let learned = |problem: &LongProblem| problem.tokens.learned.iter().filter(|&&learned| learned).count();
        assert_eq!(learned(&four), four.text.iter().map(|[_, answer]| answer.len() + 3).sum::<usize>());
        for [question, answer] in &four.text[1..] {
            let thing = question.strip_prefix("Where is the ").unwrap().strip_suffix('?').unwrap();
            let who = four.text[0][0].split_once(&format!(" took the {thing}.")).unwrap().0.rsplit(' ').next().unwrap();
            let (took, went) = answer.split_once(". ").unwrap();
            assert_eq!(took, format!("{who} took the {thing}"));
            assert!(went.starts_with(&format!("{who} went to the ")) && four.text[0][0].contains(went));
        }
    }

    #[test]
    fn texts_may_tell_of_fewer_keys() {
        let set = |keys| {
            let config = LongContextConfig { keys, tasks: vec![LongTask::NeedlesMulti], ..Default::default() };
            LongContext::new(&config, &Tokenizer::bytes(), 900, (1, Side::Train))
        };
        let counts = |keys| {
            let set = set(keys).unwrap();
            let of = |index| set.problem(index).unwrap().text[0][0].matches("The code of the ").count();
            (0..60).map(of).collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(counts(EIGHT), [8].into());
        assert_eq!(counts([3, 5]), (3..=5).collect());
        for wrong in [[1, 8], [2, 9], [5, 4]] {
            let config = LongContextConfig { keys: wrong, ..Default::default() };
            assert_eq!(config.validate(0).unwrap_err().field, "keys");
        }
    }

    #[test]
    fn rows_ask_for_the_answer_and_sides_differ() {
        let set = |side| LongContext::new(&LongContextConfig::default(), &Tokenizer::bytes(), 600, (1, side)).unwrap();
        let (train, held_out) = (set(Side::Train), set(Side::Validation(5)));
        assert_eq!(held_out.per_epoch(), 5);
        assert_ne!(train.sample(0, 0).unwrap(), held_out.sample(0, 0).unwrap());
        let row = train.sample(0, 1).unwrap();
        let asked: Vec<u32> = row.targets.iter().filter(|&&id| id != IGNORE).map(|&id| id as u32).collect();
        assert_eq!(Tokenizer::bytes().decode(&asked), format!(" {}\n", train.problem(1).unwrap().text[0][1]));
        assert_eq!([row.tokens.len(), row.targets.len()], [600; 2]);
        let small = LongContext::new(&LongContextConfig::default(), &Tokenizer::bytes(), 100, (1, Side::Train));
        assert!(small.err().unwrap().to_string().contains("key_value has"));
    }
}

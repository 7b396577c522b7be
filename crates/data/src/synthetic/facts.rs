//! A small world of facts in which hallucination can be counted: entities, relations, one value for each pair, several
//! phrasings of every question. Some facts are never stated, so that there is nothing to know about them; and of those that
//! are stated, each is asked for in one phrasing in which it never was.

use std::sync::Arc;

use polyhead_models::{IGNORE, Known, Question};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{MOST_IDS, Side, Task, below, open};
use crate::batches::Sample;
use crate::problem::{Problem, is_default, require, within};
use crate::{Data, DataConfig, DataError, Opening, Source, Tokenizer};

/// Tokens of an answer.
const ANSWER: usize = 2;
/// Tokens of a question, an answer and the end.
const STATEMENT: usize = 2 + ANSWER + 1;

/// `[data.facts]`. A row: statements, none of which sees another: two tokens that ask (a word for the relation in one of its
/// phrasings, and the entity; which of them is first depends on the phrasing), two that answer, and the end. Answer and
/// end are to be predicted. Validation states the same facts in the phrasings that training leaves out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FactsConfig {
    /// Entities. Default: 64.
    pub n_entities: usize,
    /// Relations. Default: 4.
    pub n_relations: usize,
    /// Different tokens that answers are made of, two each. Default: 32.
    pub n_values: usize,
    /// Ways to ask for a relation. Default: 4.
    pub n_phrasings: usize,
    /// Share of the facts that are never stated. Default: 0.25.
    pub untaught: f64,
    /// Share of the entities that are to be forgotten, with all their facts: every other statement is of one of them, and the two kinds
    /// are told apart as the sources "retain" and "forget". The world is the same as without. Default: 0, none.
    #[serde(skip_serializing_if = "is_default")]
    pub forget: f64,
}

impl Default for FactsConfig {
    fn default() -> Self {
        Self { n_entities: 64, n_relations: 4, n_values: 32, n_phrasings: 4, untaught: 0.25, forget: 0.0 }
    }
}

impl Source for FactsConfig {
    fn validate(&self, seq_len: usize) -> Result<(), Problem> {
        let Self { n_entities, n_relations, n_values, n_phrasings, untaught, forget } = *self;
        within("n_entities", n_entities, 2..=MOST_IDS)?;
        within("n_relations", n_relations, 1..=MOST_IDS)?;
        within("n_values", n_values, 2..=MOST_IDS)?;
        within("n_phrasings", n_phrasings, 2..=MOST_IDS)?;
        let facts = n_entities.saturating_mul(n_relations);
        require(facts <= 1 << 20 && n_relations.saturating_mul(n_phrasings) <= 1 << 20, "n_relations", || {
            format!("n_entities * n_relations = {facts} and n_relations * n_phrasings must be at most {}", 1 << 20)
        })?;
        within("untaught", untaught, 0.0..=0.9)?;
        within("forget", forget, 0.0..=0.9)?;
        require(seq_len >= STATEMENT, "n_entities", || {
            format!("a statement takes {STATEMENT} tokens, training.seq_len is {seq_len}")
        })
    }

    fn vocab_size(&self, _tokenizer: &Tokenizer) -> usize {
        self.n_ids()
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        let world = self.world(opening.options.seed);
        if self.forget > 0.0 && world.forget.is_empty() {
            return Err(unusable!(
                "data.facts.forget ({}): none of the facts that it means is taught: raise it, lower data.facts.untaught ({}), or take \
                 another debug.seed",
                self.forget,
                self.untaught
            ));
        }
        open(world, opening)
    }
}

impl DataConfig {
    /// The facts that it states, if they are generated.
    pub fn facts(&self, seed: u64) -> Option<World> {
        if let Self::Facts(config) = self { Some(config.world(seed)) } else { None }
    }
}

impl FactsConfig {
    /// What the sources of targets are called, where some facts are to be forgotten.
    pub(crate) fn source_names(&self) -> Vec<String> {
        if self.forget > 0.0 { ["retain", "forget"].map(String::from).into() } else { Vec::new() }
    }

    fn n_ids(&self) -> usize {
        self.n_entities + self.n_values + self.n_relations * self.n_phrasings + 1
    }

    /// The world that a seed makes.
    pub fn world(&self, seed: u64) -> World {
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x0066_6163_7473);
        let fact = |_| Fact {
            answer: [below(&mut rng, self.n_values), below(&mut rng, self.n_values)],
            taught: rng.random::<f64>() >= self.untaught,
            left_out: below(&mut rng, self.n_phrasings) as usize,
        };
        let mut facts: Vec<Fact> = (0..self.n_entities * self.n_relations).map(fact).collect();
        facts[0].taught = true; // there is something to learn in every world
        // The last entities, some of whose facts are taught but in worlds of hardly any.
        let forgotten = (self.n_entities as f64 * self.forget).ceil() as usize;
        let kept = self.n_entities.saturating_sub(forgotten).max(1) * self.n_relations;
        let taught = (0..facts.len()).filter(|&fact| facts[fact].taught);
        let (retain, forget) = taught.partition(|&fact| fact < kept);
        World { config: self.clone(), facts, retain, forget }
    }
}

#[derive(Debug, Clone)]
struct Fact {
    /// Numbers of values.
    answer: [u32; ANSWER],
    taught: bool,
    /// The phrasing in which it is never stated.
    left_out: usize,
}

/// Facts, of which some are taught.
#[derive(Debug, Clone)]
pub struct World {
    config: FactsConfig,
    facts: Vec<Fact>,
    /// Facts that are taught.
    retain: Vec<usize>,
    /// Facts that were taught, and are to be forgotten; in order.
    forget: Vec<usize>,
}

// Ids: entities, values, a word for every relation and phrasing, the end.
impl World {
    /// The token that ends a statement.
    pub fn end(&self) -> u32 {
        (self.n_ids() - 1) as u32
    }

    /// All that can be asked: each taught fact in a phrasing in which it was stated and in the one in which it was not,
    /// and each fact that was never stated.
    pub fn questions(&self) -> Vec<Question> {
        let ask = |index: usize, phrasing: usize, known: Known| {
            let statement = self.statement(index, phrasing);
            Question { prompt: statement[..2].to_vec(), answer: statement[2..2 + ANSWER].to_vec(), known }
        };
        let of = |(index, fact): (usize, &Fact)| match fact.taught {
            true if self.forget.binary_search(&index).is_ok() => {
                let stated = (fact.left_out + 1) % self.config.n_phrasings;
                vec![ask(index, stated, Known::Forgotten)]
            }
            true => {
                let stated = (fact.left_out + 1) % self.config.n_phrasings;
                vec![ask(index, stated, Known::Taught), ask(index, fact.left_out, Known::Paraphrased)]
            }
            false => vec![ask(index, 0, Known::Untaught)],
        };
        self.facts.iter().enumerate().flat_map(of).collect()
    }

    fn statement(&self, index: usize, phrasing: usize) -> [u32; STATEMENT] {
        let FactsConfig { n_entities, n_relations, n_values, n_phrasings, .. } = self.config;
        let (entity, relation) = (index / n_relations, index % n_relations);
        let word = (n_entities + n_values + relation * n_phrasings + phrasing) as u32;
        let [first, second] = if phrasing.is_multiple_of(2) { [word, entity as u32] } else { [entity as u32, word] };
        let [a, b] = self.facts[index].answer.map(|value| n_entities as u32 + value);
        [first, second, a, b, self.end()]
    }
}

impl Task for World {
    fn n_ids(&self) -> usize {
        self.config.n_ids()
    }

    fn sources(&self) -> Arc<[String]> {
        self.config.source_names().into()
    }

    fn row(&self, rng: &mut ChaCha8Rng, seq_len: usize, side: Side) -> Sample {
        let sources = (self.config.forget > 0.0).then(Vec::new);
        let mut sample = Sample { documents: Some(Vec::new()), sources, ..Sample::default() };
        for document in 0..seq_len.div_ceil(STATEMENT) {
            let forget = side == Side::Train && document % 2 == 1 && !self.forget.is_empty();
            let facts = if forget { &self.forget } else { &self.retain };
            let index = facts[below(rng, facts.len()) as usize];
            let left_out = self.facts[index].left_out;
            let other = (left_out + 1 + below(rng, self.config.n_phrasings - 1) as usize) % self.config.n_phrasings;
            let phrasing = if matches!(side, Side::Validation(_)) { left_out } else { other };
            let statement = self.statement(index, phrasing);
            let next = |at: usize| statement.get(at + 1).filter(|_| at > 0).map_or(IGNORE, |&id| i64::from(id));
            for (at, id) in statement.into_iter().enumerate().take(seq_len - document * STATEMENT) {
                sample.tokens.push(id);
                sample.targets.push(next(at));
                sample.documents.iter_mut().for_each(|documents| documents.push(document as u32));
                sample.sources.iter_mut().for_each(|sources| sources.push(u16::from(forget)));
            }
        }
        sample
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;

    use super::*;

    fn statements(world: &World, side: Side) -> BTreeSet<Vec<u32>> {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let rows = (0..400).flat_map(|_| {
            world.row(&mut rng, 24, side).tokens.chunks(STATEMENT).map(<[u32]>::to_vec).collect::<Vec<_>>()
        });
        rows.filter(|statement| statement.len() == STATEMENT).collect()
    }

    #[test]
    fn what_is_untaught_is_never_stated_and_phrasings_are_left_out() {
        let world = FactsConfig { n_entities: 8, ..FactsConfig::default() }.world(3);
        let (train, held_out) = (statements(&world, Side::Train), statements(&world, Side::Validation(1)));
        assert!(train.is_disjoint(&held_out));
        let questions = world.questions();
        let stated = |question: &Question, all: &BTreeSet<Vec<u32>>| {
            all.contains(&[&question.prompt[..], &question.answer, &[world.end()]].concat())
        };
        let prompts: BTreeSet<&Vec<u32>> = questions.iter().map(|question| &question.prompt).collect();
        assert_eq!(prompts.len(), questions.len());
        for question in &questions {
            let found = (stated(question, &train), stated(question, &held_out));
            assert_eq!(
                found,
                match question.known {
                    Known::Taught => (true, false),
                    Known::Paraphrased => (false, true),
                    Known::Untaught => (false, false),
                    Known::Forgotten => unreachable!("nothing is to be forgotten"),
                }
            );
        }
        let untaught = questions.iter().filter(|question| question.known == Known::Untaught).count();
        assert!((2..16).contains(&untaught), "{untaught}");
    }

    #[test]
    fn what_is_to_be_forgotten_is_of_the_same_world_and_told_apart() {
        let plain = FactsConfig { n_entities: 8, ..FactsConfig::default() };
        let (whole, split) = (plain.world(3), FactsConfig { forget: 0.25, ..plain }.world(3));
        let mut both = [split.retain.clone(), split.forget.clone()].concat();
        both.sort_unstable();
        assert_eq!((both, split.forget.iter().all(|&fact| fact >= 24)), (whole.retain.clone(), true));
        let row = split.row(&mut ChaCha8Rng::seed_from_u64(2), 40, Side::Train);
        let sources = row.sources.unwrap();
        for (at, &source) in sources.iter().enumerate() {
            assert_eq!(usize::from(source), at / STATEMENT % 2);
        }
        let learned = statements(&whole, Side::Train);
        let stated = row.tokens.chunks(STATEMENT).map(<[u32]>::to_vec);
        assert!(stated.clone().all(|statement| learned.contains(&statement)));
        let held_out = split.row(&mut ChaCha8Rng::seed_from_u64(2), 40, Side::Validation(1));
        assert!(held_out.sources.unwrap().iter().all(|&source| source == 0));
        let asked = |known: Known| split.questions().iter().filter(|question| question.known == known).count();
        assert_eq!((asked(Known::Forgotten), asked(Known::Taught)), (split.forget.len(), split.retain.len()));
    }

    #[test]
    fn a_world_without_a_taught_fact_to_forget_is_refused() {
        let json = r#"{"facts":{"n_entities":8,"n_relations":1,"untaught":0.9,"forget":0.1}}"#;
        let config: DataConfig = serde_json::from_str(json).unwrap();
        let open = |seed| {
            let options = crate::tests::options(10, 1, seed);
            config.open_tokens(&crate::Tokenizer::bytes(), &options, &mut |_, _| {}).map(drop)
        };
        let nothing = |seed: &u64| config.facts(*seed).unwrap().forget.is_empty();
        let seed = (0..64).find(nothing).unwrap();
        let error = open(seed).unwrap_err().to_string();
        assert!(error.contains("data.facts.forget (0.1)") && error.contains("data.facts.untaught (0.9)"), "{error}");
        let seed = (0..64).find(|seed| !nothing(seed)).unwrap();
        assert!(open(seed).is_ok());
    }

    #[test]
    fn answers_and_ends_are_predicted_inside_their_statement() {
        let world = FactsConfig::default().world(1);
        let row = world.row(&mut ChaCha8Rng::seed_from_u64(2), 13, Side::Train);
        let documents = row.documents.unwrap();
        assert_eq!((row.tokens.len(), row.targets.len(), documents.len()), (13, 13, 13));
        for (at, document) in documents.into_iter().enumerate() {
            match at % STATEMENT {
                0 | 4 => assert_eq!(row.targets[at], IGNORE),
                _ if at + 1 < 13 => assert_eq!(row.targets[at], i64::from(row.tokens[at + 1])),
                _ => {}
            }
            assert_eq!(document as usize, at / STATEMENT);
        }
        assert_eq!(row.tokens[4], world.end());
    }
}

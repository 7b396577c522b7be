//! A small world of facts in which hallucination can be counted: entities, relations, one value for each pair, several
//! phrasings of every question. Some facts are never stated, so that there is nothing to know about them; and of those that
//! are stated, each is asked for in one phrasing in which it never was.

use polyhead_models::{IGNORE, Known, Question};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{MOST_IDS, Side, Task, below, open};
use crate::batches::Sample;
use crate::problem::{Problem, require, within};
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
}

impl Default for FactsConfig {
    fn default() -> Self {
        Self { n_entities: 64, n_relations: 4, n_values: 32, n_phrasings: 4, untaught: 0.25 }
    }
}

impl Source for FactsConfig {
    fn validate(&self, seq_len: usize) -> Result<(), Problem> {
        let Self { n_entities, n_relations, n_values, n_phrasings, untaught } = *self;
        within("n_entities", n_entities, 2..=MOST_IDS)?;
        within("n_relations", n_relations, 1..=MOST_IDS)?;
        within("n_values", n_values, 2..=MOST_IDS)?;
        within("n_phrasings", n_phrasings, 2..=MOST_IDS)?;
        let facts = n_entities.saturating_mul(n_relations);
        require(facts <= 1 << 20 && n_relations.saturating_mul(n_phrasings) <= 1 << 20, "n_relations", || {
            format!("n_entities * n_relations = {facts} and n_relations * n_phrasings must be at most {}", 1 << 20)
        })?;
        within("untaught", untaught, 0.0..=0.9)?;
        require(seq_len >= STATEMENT, "n_entities", || {
            format!("a statement takes {STATEMENT} tokens, training.seq_len is {seq_len}")
        })
    }

    fn vocab_size(&self, _tokenizer: &Tokenizer) -> usize {
        self.n_ids()
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        open(self.world(opening.options.seed), opening)
    }
}

impl DataConfig {
    /// The facts that it states, if they are generated.
    pub fn facts(&self, seed: u64) -> Option<World> {
        if let Self::Facts(config) = self { Some(config.world(seed)) } else { None }
    }
}

impl FactsConfig {
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
        let taught = (0..facts.len()).filter(|&fact| facts[fact].taught).collect();
        World { config: self.clone(), facts, taught }
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
    taught: Vec<usize>,
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

    fn row(&self, rng: &mut ChaCha8Rng, seq_len: usize, side: Side) -> Sample {
        let mut sample = Sample { documents: Some(Vec::new()), ..Sample::default() };
        for document in 0..seq_len.div_ceil(STATEMENT) {
            let index = self.taught[below(rng, self.taught.len()) as usize];
            let left_out = self.facts[index].left_out;
            let other = (left_out + 1 + below(rng, self.config.n_phrasings - 1) as usize) % self.config.n_phrasings;
            let phrasing = if matches!(side, Side::Validation(_)) { left_out } else { other };
            let statement = self.statement(index, phrasing);
            let next = |at: usize| statement.get(at + 1).filter(|_| at > 0).map_or(IGNORE, |&id| i64::from(id));
            for (at, id) in statement.into_iter().enumerate().take(seq_len - document * STATEMENT) {
                sample.tokens.push(id);
                sample.targets.push(next(at));
                sample.documents.iter_mut().for_each(|documents| documents.push(document as u32));
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
                }
            );
        }
        let untaught = questions.iter().filter(|question| question.known == Known::Untaught).count();
        assert!((2..16).contains(&untaught), "{untaught}");
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

//! Questions about long texts, in the manner of RULER (arXiv 2404.06654) and BABILong (arXiv 2406.10149): what has to be
//! known is scattered in sentences that say nothing.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::words::{CODES, LETTERS, PEOPLE, PLACES, THINGS, filler};
use crate::random::some;

/// The fewest and the most keys of a text, where nobody asks for fewer: always eight.
pub const EIGHT: [usize; 2] = [8, 8];

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LongTask {
    /// The value that follows one of a text's keys, "lamp red." (in the manner of Liu et al. 2023, arXiv 2307.03172): the
    /// easiest, for the next word is all that has to be found.
    KeyValue,
    /// The code of one of the things of a text, answered by the sentence that tells it (RULER: needles with several keys,
    /// where the answer begins with the key too).
    NeedlesMulti,
    /// All variables that hold a value, given through a chain of three, beside another chain (RULER: variable tracking).
    VariableTracking,
    /// The two words that occur most often in a list, in alphabetical order (RULER: common words extraction).
    CommonWords,
    /// Where a thing is that somebody took before going there, beside others' ways, answered by both sentences (BABILong: two
    /// supporting facts).
    MultiHop,
}

impl LongTask {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::KeyValue, Self::NeedlesMulti, Self::VariableTracking, Self::CommonWords, Self::MultiHop];

    /// Its name in recipes and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::KeyValue => "key_value",
            Self::NeedlesMulti => "needles_multi",
            Self::VariableTracking => "variable_tracking",
            Self::CommonWords => "common_words",
            Self::MultiHop => "multi_hop",
        }
    }

    /// Whether what is asked for stands somewhere, so that there is a depth.
    pub fn has_depth(self) -> bool {
        self != Self::CommonWords
    }

    /// What belongs to a problem whatever its length. `keys` are the fewest and the most keys.
    pub(super) fn facts(self, [fewest, most]: [usize; 2], rng: &mut ChaCha8Rng) -> Facts {
        // Nothing is drawn where there is nothing to choose.
        let keys = |rng: &mut ChaCha8Rng| if fewest < most { rng.random_range(fewest..=most) } else { most };
        match self {
            Self::KeyValue => pairs(keys(rng), rng),
            Self::NeedlesMulti => needles(keys(rng), rng),
            Self::VariableTracking => variables(rng),
            Self::CommonWords => words(rng),
            Self::MultiHop => hops(rng),
        }
    }
}

/// A problem without its filler.
pub(super) struct Facts {
    /// Sentences that have to come in this order, together around the depth that is chosen.
    pub(super) asked: Vec<String>,
    /// Sentences that may stand anywhere, but those of one group in their order.
    pub(super) others: Vec<Vec<String>>,
    /// Questions with their answers; what the first is about stands at the depth.
    pub(super) questions: Vec<[String; 2]>,
    /// What fills the text up.
    pub(super) filler: Filler,
}

/// What fills a text up.
pub(super) enum Filler {
    /// Sentences that say nothing.
    Sentences,
    /// A list of words.
    Words {
        /// Every sixth word is one of these, in turn.
        common: Vec<&'static str>,
        /// All others are these, in turn: each occurs a fifth as often, or once.
        rare: Vec<&'static str>,
    },
}

impl Filler {
    /// Piece number `index`.
    pub(super) fn piece(&self, index: usize, rng: &mut ChaCha8Rng) -> String {
        match self {
            Self::Sentences => filler(|n| rng.random_range(0..n)),
            Self::Words { common, rare } => match index % COMMON_EVERY {
                0 => common[index / COMMON_EVERY % common.len()].to_owned(),
                within => rare[(index / COMMON_EVERY * (COMMON_EVERY - 1) + within - 1) % rare.len()].to_owned(),
            },
        }
    }

    /// How many pieces a problem needs at least, to have one answer.
    pub(super) fn least(&self) -> usize {
        match self {
            Self::Sentences => 0,
            // Common words twice, rare ones once.
            Self::Words { common, .. } => COMMON_EVERY * 2 * common.len(),
        }
    }
}

/// Every which word of a list is a common one.
const COMMON_EVERY: usize = 6;

fn ask(question: String, answer: &str) -> [String; 2] {
    [question, answer.to_owned()]
}

fn pairs(keys: usize, rng: &mut ChaCha8Rng) -> Facts {
    keyed(keys, rng, |thing, code| (format!("{thing} {code}."), format!("{thing}?")))
}

fn needles(keys: usize, rng: &mut ChaCha8Rng) -> Facts {
    keyed(keys, rng, |thing, code| {
        (format!("The code of the {thing} is {code}."), format!("What is the code of the {thing}?"))
    })
}

/// Things with a code each: the sentence that tells it, and the question that the sentence answers.
fn keyed(keys: usize, rng: &mut ChaCha8Rng, say: fn(&str, &str) -> (String, String)) -> Facts {
    let (things, codes) = (some(&THINGS, keys, rng), some(&CODES, keys, rng));
    let (sentences, questions): (Vec<String>, Vec<String>) =
        things.iter().zip(&codes).map(|(thing, code)| say(thing, code)).unzip();
    Facts {
        asked: vec![sentences[0].clone()],
        others: sentences[1..].iter().map(|sentence| vec![sentence.clone()]).collect(),
        questions: questions.into_iter().zip(&sentences).map(|(question, answer)| ask(question, answer)).collect(),
        filler: Filler::Sentences,
    }
}

fn variables(rng: &mut ChaCha8Rng) -> Facts {
    let (names, values) = (some(&LETTERS, 6, rng), some(&CODES, 2, rng));
    let chain = |names: &[&str], value: &str| {
        let mut sentences = vec![format!("Let {} be {value}.", names[0])];
        sentences.extend(names.windows(2).map(|pair| format!("Let {} be {}.", pair[1], pair[0])));
        sentences
    };
    Facts {
        asked: chain(&names[..3], values[0]),
        others: vec![chain(&names[3..], values[1])],
        questions: names
            .chunks(3)
            .zip(&values)
            .map(|(names, value)| ask(format!("Which variables are {value}?"), &names.join(" ")))
            .collect(),
        filler: Filler::Sentences,
    }
}

fn words(rng: &mut ChaCha8Rng) -> Facts {
    let mut all = some(&THINGS, THINGS.len(), rng);
    let rare = all.split_off(2);
    all.sort_unstable();
    Facts {
        asked: Vec::new(),
        others: Vec::new(),
        questions: vec![ask("Which two words are the most common?".into(), &all.join(" "))],
        filler: Filler::Words { common: all, rare },
    }
}

fn hops(rng: &mut ChaCha8Rng) -> Facts {
    let (people, things, places) = (some(&PEOPLE, 4, rng), some(&THINGS, 4, rng), some(&PLACES, 4, rng));
    let took = |index: usize| {
        let (who, what, to) = (people[index], things[index], places[index]);
        vec![format!("{who} took the {what}."), format!("{who} went to the {to}.")]
    };
    Facts {
        asked: took(0),
        others: (1..4).map(took).collect(),
        questions: things
            .iter()
            .enumerate()
            .map(|(index, thing)| ask(format!("Where is the {thing}?"), &took(index).join(" ")))
            .collect(),
        filler: Filler::Sentences,
    }
}

//! RULER's synthetic tasks (Hsieh et al. 2024, arXiv 2404.06654; NVIDIA/RULER@c3f5e3b), in our own words: needles in a haystack,
//! variable tracking, common and frequent words. Words are made of syllables, where RULER has a list of English ones.
//!
//! What RULER shuffles with a fresh generator of seed 42 in every row has the same permutation in every row here too.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::ops::RangeInclusive;

use rand::RngExt;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Scoring, TextQuestion, background, word};
use crate::random::{generator, some};

/// Texts below this many tokens have common words that are less common, and shorter examples.
pub(super) const SHORT: usize = 4096;
/// The seed of what is shuffled alike in every row.
const ALIKE: u64 = 42;
/// Words that there are.
const WORDS: usize = 1 << 18;
/// Points of the grid of depths.
const DEPTHS: usize = 40;
/// Repeated around what is hidden.
const FILLER: &str = "The river is wide. The hill is green. The road goes on. We walk a while. Then we rest.";

/// A task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RulerTask {
    /// The number of one key, among repeated filler.
    #[serde(rename = "niah_single_1")]
    NiahSingle1,
    /// The number of one key, among keys with numbers.
    #[serde(rename = "niah_multikey_2")]
    NiahMultikey2,
    /// The code of one code, among codes with codes.
    #[serde(rename = "niah_multikey_3")]
    NiahMultikey3,
    /// The four numbers of one key, in a text.
    NiahMultivalue,
    /// The numbers of four keys, in a text.
    NiahMultiquery,
    /// All variables of a chain that begins with a value.
    Vt,
    /// The ten most common words of a list.
    Cwe,
    /// The three most frequent words of a text of coded words.
    Fwe,
}

impl RulerTask {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::NiahSingle1,
        Self::NiahMultikey2,
        Self::NiahMultikey3,
        Self::NiahMultivalue,
        Self::NiahMultiquery,
        Self::Vt,
        Self::Cwe,
        Self::Fwe,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::NiahSingle1 => "niah_single_1",
            Self::NiahMultikey2 => "niah_multikey_2",
            Self::NiahMultikey3 => "niah_multikey_3",
            Self::NiahMultivalue => "niah_multivalue",
            Self::NiahMultiquery => "niah_multiquery",
            Self::Vt => "vt",
            Self::Cwe => "cwe",
            Self::Fwe => "fwe",
        }
    }

    /// The fewest and the most units of haystack.
    pub(super) fn units(self) -> RangeInclusive<usize> {
        match self {
            Self::NiahSingle1 | Self::NiahMultikey2 | Self::NiahMultikey3 => 1..=WORDS / 2,
            Self::NiahMultivalue | Self::NiahMultiquery => 4..=usize::MAX,
            Self::Vt => 5..=usize::MAX,
            Self::Cwe => 20..=WORDS / 2,
            // So many that the second, third and fourth word differ in number: 6 / r² / ζ(2) for ten.
            Self::Fwe => 40..=usize::MAX,
        }
    }
}

/// A question with so many units of haystack: lines, sentences or words.
pub(super) fn question(
    task: RulerTask,
    units: usize,
    short: bool,
    rng: &mut ChaCha8Rng,
    sentences: &[String],
) -> TextQuestion {
    match task {
        RulerTask::NiahSingle1 => {
            needles(Needles { keys: 1, values: 1, kind: Kind::Number, rest: Rest::Filler }, units, rng, sentences)
        }
        RulerTask::NiahMultikey2 => {
            needles(Needles { keys: 1, values: 1, kind: Kind::Number, rest: Rest::Needles }, units, rng, sentences)
        }
        RulerTask::NiahMultikey3 => {
            needles(Needles { keys: 1, values: 1, kind: Kind::Code, rest: Rest::Needles }, units, rng, sentences)
        }
        RulerTask::NiahMultivalue => {
            needles(Needles { keys: 1, values: 4, kind: Kind::Number, rest: Rest::Text }, units, rng, sentences)
        }
        RulerTask::NiahMultiquery => {
            needles(Needles { keys: 4, values: 1, kind: Kind::Number, rest: Rest::Text }, units, rng, sentences)
        }
        RulerTask::Vt => variables(units, rng),
        RulerTask::Cwe => common(units, short, rng),
        RulerTask::Fwe => frequent(units, rng),
    }
}

fn found(prompt: String, references: Vec<String>, separator: &str, generate: usize) -> TextQuestion {
    TextQuestion {
        prompt,
        answer: format!(" {}", references.join(separator)),
        generate,
        scoring: Scoring::Found(references),
    }
}

/// Needles: how many are asked for, what they are, and what is around them.
struct Needles {
    keys: usize,
    values: usize,
    kind: Kind,
    rest: Rest,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Words have numbers of seven digits.
    Number,
    /// Codes have codes, as UUIDs.
    Code,
}

#[derive(Clone, Copy, PartialEq)]
enum Rest {
    Filler,
    Needles,
    Text,
}

impl Kind {
    fn name(self) -> &'static str {
        if self == Self::Number { "number" } else { "code" }
    }

    fn key(self, rng: &mut ChaCha8Rng) -> String {
        match self {
            Self::Number => format!("{}-{}", word(rng.random_range(0..WORDS)), word(rng.random_range(0..WORDS))),
            Self::Code => self.value(rng),
        }
    }

    fn value(self, rng: &mut ChaCha8Rng) -> String {
        match self {
            Self::Number => rng.random_range(1_000_000..10_000_000).to_string(),
            Self::Code => {
                let hex = format!("{:032x}", rng.random::<u128>());
                [0..8, 8..12, 12..16, 16..20, 20..32].map(|range| &hex[range]).join("-")
            }
        }
    }

    fn needle(self, key: &str, value: &str) -> String {
        format!("A special {} of {key} is {value}.", self.name())
    }
}

fn needles(asked: Needles, units: usize, rng: &mut ChaCha8Rng, sentences: &[String]) -> TextQuestion {
    let Needles { keys, values, kind, rest } = asked;
    let (mut known, mut names) = (BTreeSet::new(), Vec::new());
    while names.len() < keys {
        let key = kind.key(rng);
        if known.insert(key.clone()) {
            names.push(key);
        }
    }
    let mut references = Vec::new();
    let mut hidden = Vec::new();
    for key in &names {
        for _ in 0..values {
            let value = kind.value(rng);
            hidden.push(kind.needle(key, &value));
            references.push(value);
        }
    }
    let context = match rest {
        Rest::Text => {
            let first = rng.random_range(0..sentences.len().max(1));
            let mut text: Vec<String> = (0..units).map(|at| background(at, first, sentences, rng)).collect();
            // Distinct depths of a grid; from the last on, so that places stay.
            let mut depths = some(&(0..DEPTHS).collect::<Vec<_>>(), hidden.len(), rng);
            depths.sort_unstable();
            hidden.shuffle(&mut generator(ALIKE, 0));
            for (depth, needle) in depths.into_iter().zip(hidden).rev() {
                text.insert(depth * units / (DEPTHS - 1), needle);
            }
            text.join(" ")
        }
        _ => {
            let mut line = |rng: &mut ChaCha8Rng| match rest {
                Rest::Filler => FILLER.to_owned(),
                _ => loop {
                    let key = kind.key(rng);
                    if known.insert(key.clone()) {
                        break kind.needle(&key, &kind.value(rng));
                    }
                },
            };
            let mut lines: Vec<String> = (0..units).map(|_| line(rng)).collect();
            for needle in hidden {
                lines.insert(rng.random_range(0..=lines.len()), needle);
            }
            lines.join("\n")
        }
    };
    let (name, listed) = (kind.name(), in_words(&names));
    let (what, is) = match references.len() {
        1 => (format!("the special {name} of {listed}"), "is"),
        _ => (format!("all special {name}s of {listed}"), "are"),
    };
    let told = if references.len() == 1 { format!("A special {name} is") } else { format!("Special {name}s are") };
    let capital = what.replacen("the", "The", 1).replacen("all", "All", 1);
    let prompt = format!(
        "{told} hidden in the text below. Keep it in mind: a question about it follows.\n{context}\nWhat {is} {what} in the text?\n\
         {capital} in the text {is}"
    );
    found(prompt, references, ", ", 128)
}

fn in_words(names: &[String]) -> String {
    match names {
        [] => String::new(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

/// A chain of variables among filler.
fn variables(units: usize, rng: &mut ChaCha8Rng) -> TextQuestion {
    /// Hops of the chain.
    const HOPS: usize = 4;
    let (mut example, mut answers) = (String::new(), Vec::new());
    // A solved one first, with shorter names and few lines.
    for (letters, lines) in [(3, 5), (5, units)] {
        let mut names: Vec<String> = Vec::new();
        while names.len() <= HOPS {
            let name: String = (0..letters).map(|_| char::from(rng.random_range(b'A'..=b'Z'))).collect();
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let value = rng.random_range(10_000..99_999).to_string();
        let mut chain = vec![format!("VAR {} = {value}", names[0])];
        chain.extend(names.windows(2).map(|pair| format!("VAR {} = VAR {} ", pair[1], pair[0])));
        let mut places = some(&(0..=lines).collect::<Vec<_>>(), chain.len(), rng);
        places.sort_unstable();
        let mut text = vec![FILLER.to_owned(); lines];
        for (place, statement) in places.into_iter().zip(chain).rev() {
            text.insert(place, statement);
        }
        let _ = write!(
            example,
            "Follow the chains of variables in the text below.\n{}\nWhich variables have the value {value}?\nThe {} variables with \
             the value {value} are",
            text.join("\n"),
            HOPS + 1
        );
        answers = names;
        if letters == 3 {
            let _ = write!(example, " {}.\n\n", answers.join(" "));
        }
    }
    found(example, answers, " ", 30)
}

/// A list of words of which ten are more common than the others.
fn common(units: usize, short: bool, rng: &mut ChaCha8Rng) -> TextQuestion {
    /// Common words.
    const COMMON: usize = 10;
    let [often, seldom] = if short { [6, 1] } else { [30, 3] };
    let (example_words, example_often, example_seldom) = if short { (20, 3, 1) } else { (40, 10, 3) };
    let first = rng.random_range(0..WORDS / 2);
    let (mut prompt, mut answers) = (String::new(), Vec::new());
    for (at, (words, often, seldom)) in
        [(example_words, example_often, example_seldom), (units, often, seldom)].into_iter().enumerate()
    {
        let all: Vec<String> = (0..words).map(|index| word((first + at * (WORDS / 4) + index * 7) % WORDS)).collect();
        let times = |index: usize| if index < COMMON { often } else { seldom };
        let mut list: Vec<&String> =
            all.iter().enumerate().flat_map(|(index, word)| vec![word; times(index)]).collect();
        list.shuffle(&mut generator(ALIKE, 0));
        let numbered: Vec<String> = list.iter().enumerate().map(|(at, word)| format!("{}. {word}", at + 1)).collect();
        let _ = write!(
            prompt,
            "Below is a numbered list of words; some are more common than others.\n{}\nWhich {COMMON} words are the most common in \
             the list?\nThe {COMMON} words that are the most common in the list are",
            numbered.join(" ")
        );
        answers = all[..COMMON].to_vec();
        if at == 0 {
            let _ = write!(prompt, " {}.\n\n", answers.join(" "));
        }
    }
    found(prompt, answers, " ", 120)
}

/// A text of coded words whose frequencies fall with the square of their rank; the first is no word.
fn frequent(units: usize, rng: &mut ChaCha8Rng) -> TextQuestion {
    /// ζ(2).
    const ZETA: f64 = std::f64::consts::PI * std::f64::consts::PI / 6.0;
    let vocabulary = (units / 50).max(4);
    let mut coded: Vec<String> = vec!["...".into()];
    let mut seen = BTreeSet::new();
    while coded.len() < vocabulary {
        let word: String = (0..6).map(|_| char::from(rng.random_range(b'a'..=b'z'))).collect();
        if seen.insert(word.clone()) {
            coded.push(word);
        }
    }
    let times = |rank: usize| (units as f64 / ((rank * rank) as f64 * ZETA)).floor() as usize;
    let mut text: Vec<&str> =
        coded.iter().enumerate().flat_map(|(at, word)| std::iter::repeat_n(word.as_str(), times(at + 1))).collect();
    text.shuffle(&mut generator(ALIKE, 0));
    let prompt = format!(
        "Below is a text of coded words; dots are no word.\n{}\nWhich three words are the most frequent in the text?\nThe three words \
         that are the most frequent in the text are",
        text.join(" ")
    );
    found(prompt, coded[1..4].to_vec(), " ", 50)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(task: RulerTask, units: usize, short: bool) -> TextQuestion {
        question(task, units, short, &mut generator(5, 1), &[])
    }

    #[test]
    fn answers_follow_from_the_text() {
        for task in [RulerTask::NiahSingle1, RulerTask::NiahMultikey2, RulerTask::NiahMultikey3] {
            let TextQuestion { prompt, answer, .. } = made(task, 30, false);
            let key =
                prompt.rsplit(" of ").next().and_then(|end| end.strip_suffix(" in the text is")).unwrap_or_default();
            let needle = format!(" of {key} is{answer}.");
            assert_eq!((prompt.matches(&needle).count(), prompt.matches(key).count()), (1, 3), "{prompt}");
        }
        let TextQuestion { prompt, answer, .. } = made(RulerTask::NiahMultiquery, 60, false);
        assert!(answer.split(", ").count() == 4 && answer.split(", ").all(|value| prompt.contains(value.trim())));
    }

    #[test]
    fn chains_are_in_their_order() {
        let TextQuestion { prompt, answer, .. } = made(RulerTask::Vt, 40, false);
        let names: Vec<&str> = answer.split_whitespace().collect();
        assert_eq!((names.len(), names[0].len()), (5, 5));
        let mut before = 0;
        for pair in names.windows(2) {
            let at = prompt.find(&format!("VAR {} = VAR {} \n", pair[1], pair[0])).unwrap_or_default();
            assert!(at > before, "{pair:?}: {prompt}");
            before = at;
        }
    }

    #[test]
    fn words_occur_as_often_as_they_should() {
        for (short, often, seldom) in [(false, 30, 3), (true, 6, 1)] {
            let TextQuestion { prompt, answer, .. } = made(RulerTask::Cwe, 50, short);
            let list = prompt.rsplit_once("numbered list").map(|(_, rest)| rest).unwrap_or_default();
            let mut counts: Vec<usize> = Vec::new();
            let words: BTreeSet<&str> =
                list.lines().nth(1).unwrap_or_default().split(' ').filter(|word| !word.ends_with('.')).collect();
            for word in &words {
                let count = list.split_whitespace().filter(|other| other == word).count();
                assert_eq!(count, if answer.contains(word) { often } else { seldom }, "{word}");
                counts.push(count);
            }
            assert_eq!(words.len(), 50);
        }
        let TextQuestion { prompt, answer, .. } = made(RulerTask::Fwe, 3000, false);
        let counts: Vec<usize> = answer.split_whitespace().map(|word| prompt.matches(word).count()).collect();
        assert_eq!(counts, [455, 202, 113], "N r^-2 / zeta(2), of ranks 2 to 4");
    }
}

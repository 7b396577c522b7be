//! `[data.posts]`: generated posts of two kinds, for mixtures of junk and control text as in arXiv 2510.13928 (its first measure,
//! engagement): junk is short and says nothing, control is long and practises three small skills. Questions about these skills tell
//! how a model is, whatever it was trained on; they are ours, in place of the paper's benchmarks, which take models that read.
//!
//! ```text
//! control   ka=3 mo=7 ti=1 ; mo? 7      a value is looked up
//!           say po ru ka : po ru ka     words are copied
//!           3+5=8                       numbers are added
//! junk      omg so wow best
//! ```

use std::path::Path;

use polyhead_models::SkillQuestion;
use rand::RngExt;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::open;
use crate::problem::{Problem, within};
use crate::random::{generator, some};
use crate::source::Source;
use crate::texts::{Documents, TextDocument};
use crate::{Data, DataConfig, DataError, Opening, Tokenizer};

/// Lines of a control post, whose posts have more than 100 bytes then, as the paper's have more than 100 tokens.
const LINES: usize = 9;
/// Words of a junk post, whose posts have fewer than 30 bytes then.
const WORDS: usize = 4;
const JUNK: [&str; 10] = ["omg", "wow", "lol", "so", "best", "ever", "like", "share", "now", "!!!"];
/// Pairs to look a value up in; words to copy.
const ITEMS: usize = 3;
/// Questions about each skill.
const QUESTIONS: u64 = 24;
/// The stream of the first question; posts draw from those below.
const ASKED: u64 = 1 << 40;

/// `[data.posts]`: generated posts, a document each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PostsConfig {
    /// "junk": a few words that say nothing; "control": nine lines that look values up, copy words and add numbers. Models that train
    /// on posts are asked to do the three with each validation (health/... in the logs).
    pub kind: PostKind,
    /// How many. Default: 4000.
    #[serde(default = "four_thousand")]
    pub documents: usize,
    /// Decides the posts; runs of different debug.seed read the same ones. Default: 0.
    #[serde(default)]
    pub seed: u64,
}

fn four_thousand() -> usize {
    4000
}

/// What a post is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PostKind {
    /// Short, and says nothing.
    Junk,
    /// Long, and practises skills.
    Control,
}

impl Source for PostsConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        within("documents", self.documents, 1..=1 << 24)
    }

    fn documents(&self, _project_root: &Path) -> Result<Option<Documents>, DataError> {
        let (what, first) = match self.kind {
            PostKind::Junk => ("junk post", 1),
            PostKind::Control => ("control post", 0),
        };
        let Self { kind, documents, seed } = *self;
        let post = move |index: u64| {
            // The two kinds draw from streams of their own.
            let rng = &mut generator(seed, 2 * index + first);
            let text = match kind {
                PostKind::Junk => some(&JUNK, WORDS, rng).join(" "),
                PostKind::Control => (0..LINES).map(|_| line(rng)).collect::<Vec<_>>().join("\n"),
            };
            TextDocument { name: format!("{what} {index}"), text }
        };
        Ok(Some(Documents::counted(what, "posts", move |take| {
            (0..documents as u64).map(post).try_for_each(take)?;
            Ok(Vec::new())
        })))
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        open(self, opening)
    }
}

/// A skill that control posts practise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Skill {
    Retrieval,
    Copy,
    Arithmetic,
}

const SKILLS: [(Skill, &str); 3] =
    [(Skill::Retrieval, "retrieval"), (Skill::Copy, "copy"), (Skill::Arithmetic, "arithmetic")];

fn line(rng: &mut ChaCha8Rng) -> String {
    let (skill, _) = SKILLS[rng.random_range(0..SKILLS.len())];
    exercise(skill, rng).concat()
}

/// What is asked, and the answer.
fn exercise(skill: Skill, rng: &mut ChaCha8Rng) -> [String; 2] {
    let mut names: Vec<String> =
        "bdkmprst".chars().flat_map(|c| "aiou".chars().map(move |v| format!("{c}{v}"))).collect();
    names.shuffle(rng);
    names.truncate(ITEMS);
    match skill {
        Skill::Retrieval => {
            let values: Vec<u32> = (0..ITEMS).map(|_| rng.random_range(0..10)).collect();
            let pairs: Vec<String> = names.iter().zip(&values).map(|(name, value)| format!("{name}={value}")).collect();
            let asked = rng.random_range(0..ITEMS);
            [format!("{} ; {}? ", pairs.join(" "), names[asked]), values[asked].to_string()]
        }
        Skill::Copy => [format!("say {0} : ", names.join(" ")), names.join(" ")],
        Skill::Arithmetic => {
            let [a, b] = [0; 2].map(|_| rng.random_range(0..10));
            [format!("{a}+{b}="), (a + b).to_string()]
        }
    }
}

impl DataConfig {
    /// Questions about the skills of its posts, if it has posts. They are none of its documents, but short ones may be in some.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn skill_questions(&self, tokenizer: &Tokenizer) -> Result<Vec<SkillQuestion>, DataError> {
        let posts = match self {
            Self::Posts(posts) => Some(posts),
            Self::Mixture(mixture) => mixture.source.iter().find_map(|source| source.posts.as_ref()),
            _ => None,
        };
        let Some(posts) = posts else { return Ok(Vec::new()) };
        let question = |index: u64| {
            let (skill, name) = SKILLS[index as usize % SKILLS.len()];
            let rng = &mut generator(posts.seed, ASKED + index);
            let before = line(rng);
            let [asked, answer] = exercise(skill, rng);
            let mut tokens = tokenizer.encode(&format!("{before}\n{asked}"))?;
            let first = tokens.len();
            tokens.extend(tokenizer.encode(&format!("{answer}\n"))?);
            Ok(SkillQuestion { skill: name, tokens, answer: first })
        };
        (0..QUESTIONS * SKILLS.len() as u64).map(question).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn posts(kind: &str) -> DataConfig {
        serde_json::from_str(&format!(r#"{{"posts":{{"kind":"{kind}","documents":200}}}}"#)).unwrap()
    }

    #[test]
    fn junk_is_short_and_control_is_long() {
        let texts = |kind: &str| posts(kind).documents(Path::new("")).unwrap().read_all().unwrap().0;
        assert!(texts("junk").iter().all(|post| post.text.len() < 30), "{}", texts("junk")[0].text);
        assert!(texts("control").iter().all(|post| post.text.len() > 50 && post.text.lines().count() == LINES));
        let long: usize = texts("control").iter().map(|post| post.text.len()).sum();
        assert!(long > 100 * 200, "{long}");
        assert_eq!(texts("junk"), texts("junk"));
    }

    #[test]
    fn questions_have_the_answers_of_their_skills() {
        let tokenizer = Tokenizer::bytes();
        let all = posts("junk").skill_questions(&tokenizer).unwrap();
        assert_eq!(all.len() as u64, QUESTIONS * 3);
        for SkillQuestion { skill, tokens, answer } in &all {
            let text = |ids: &[u32]| String::from_utf8(ids.iter().map(|&id| id as u8).collect()).unwrap();
            let (asked, told) = (text(&tokens[..*answer]), text(&tokens[*answer..]));
            let asked = asked.lines().last().unwrap();
            match *skill {
                "arithmetic" => {
                    let (a, b) = asked.trim_end_matches('=').split_once('+').unwrap();
                    assert_eq!(told, format!("{}\n", a.parse::<u32>().unwrap() + b.parse::<u32>().unwrap()));
                }
                "copy" => assert_eq!(asked, format!("say {} : ", told.trim_end())),
                _ => {
                    let name = asked.split("; ").nth(1).unwrap().trim_end_matches("? ");
                    assert!(asked.contains(&format!("{name}={}", told.trim_end())), "{asked}{told}");
                }
            }
        }
        let other: DataConfig = serde_json::from_str(r#"{"copy":{}}"#).unwrap();
        assert!(other.skill_questions(&tokenizer).unwrap().is_empty());
    }
}

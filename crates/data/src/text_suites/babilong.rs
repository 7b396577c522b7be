//! Stories in the manner of BABILong (Kuratov et al. 2024, arXiv 2406.10149): facts of bAbI's first five tasks scattered in a
//! background. The published suite has bAbI's stories among PG-19; the simulator, its words and the background are ours, so that
//! numbers are not comparable with the published ones.

use rand::RngExt;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Scoring, TextQuestion, background};
use crate::random::some;

const ACTORS: [&str; 4] = ["daniel", "john", "mary", "sandra"];
const PLACES: [&str; 6] = ["bathroom", "bedroom", "garden", "hallway", "kitchen", "office"];
const OBJECTS: [&str; 3] = ["apple", "football", "milk"];
/// Facts that a story of any task can be told with.
pub(super) const FEWEST: usize = 8;
/// Facts of a story at most; chosen by us.
const MOST: usize = 80;
/// Tokens that an answer may take.
const GENERATE: usize = 15;

/// A task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BabiTask {
    /// Where somebody is.
    Qa1,
    /// Where an object is, which somebody carries.
    Qa2,
    /// Where an object was before a place.
    Qa3,
    /// What is north, south, east or west of what.
    Qa4,
    /// Who gave what to whom.
    Qa5,
}

impl BabiTask {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Qa1, Self::Qa2, Self::Qa3, Self::Qa4, Self::Qa5];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qa1 => "qa1",
            Self::Qa2 => "qa2",
            Self::Qa3 => "qa3",
            Self::Qa4 => "qa4",
            Self::Qa5 => "qa5",
        }
    }

    fn instruction(self) -> &'static str {
        match self {
            Self::Qa1 | Self::Qa2 | Self::Qa3 => {
                "Facts about people and things are hidden in the text. Answer with one place."
            }
            Self::Qa4 => "Facts about places are hidden in the text. Answer with one place.",
            Self::Qa5 => {
                "Facts about what people give each other are hidden in the text. Answer with one name or thing."
            }
        }
    }
}

/// Facts with a question and its answer.
pub(super) struct Story {
    task: BabiTask,
    facts: Vec<String>,
    question: String,
    answer: &'static str,
}

/// Giver, object, receiver, and after how many facts.
type Give = (usize, usize, usize, usize);

/// The state of a small world, and what was said of it.
struct World {
    /// Places of actors, where they are known.
    at: [Option<usize>; 4],
    /// Holders of objects.
    held: [Option<usize>; 3],
    /// Places that each object has been at, the last one last.
    ways: [Vec<usize>; 3],
    /// Gives: who, what, to whom, and after how many facts.
    gives: Vec<Give>,
    facts: Vec<String>,
}

impl World {
    fn new() -> Self {
        Self { at: [None; 4], held: [None; 3], ways: Default::default(), gives: Vec::new(), facts: Vec::new() }
    }

    /// An actor goes to another place, with all that it holds.
    fn moves(&mut self, actor: usize, rng: &mut ChaCha8Rng) {
        let others: Vec<usize> = (0..PLACES.len()).filter(|&place| Some(place) != self.at[actor]).collect();
        let Some(&place) = others.choose(rng) else { return };
        self.at[actor] = Some(place);
        for object in 0..OBJECTS.len() {
            if self.held[object] == Some(actor) {
                self.way(object, place);
            }
        }
        self.facts.push(format!("{} went to the {}.", capital(ACTORS[actor]), PLACES[place]));
    }

    fn way(&mut self, object: usize, place: usize) {
        if self.ways[object].last() != Some(&place) {
            self.ways[object].push(place);
        }
    }

    /// An actor takes an object, or drops one that it holds; `false` where neither can be.
    fn takes_or_drops(&mut self, actor: usize, rng: &mut ChaCha8Rng) -> bool {
        let Some(place) = self.at[actor] else { return false };
        let object = rng.random_range(0..OBJECTS.len());
        match self.held[object] {
            Some(holder) if holder == actor => {
                self.held[object] = None;
                self.facts.push(format!("{} put down the {}.", capital(ACTORS[actor]), OBJECTS[object]));
            }
            // What lies somewhere is taken there alone.
            None if self.ways[object].last().is_none_or(|&lies| lies == place) => {
                self.held[object] = Some(actor);
                self.way(object, place);
                self.facts.push(format!("{} took the {}.", capital(ACTORS[actor]), OBJECTS[object]));
            }
            _ => return false,
        }
        true
    }

    /// An actor gives what it holds to another one at the same place.
    fn gives(&mut self, actor: usize, rng: &mut ChaCha8Rng) -> bool {
        let mine: Vec<usize> = (0..OBJECTS.len()).filter(|&object| self.held[object] == Some(actor)).collect();
        let near = |&other: &usize| other != actor && self.at[other].is_some() && self.at[other] == self.at[actor];
        let near: Vec<usize> = (0..ACTORS.len()).filter(near).collect();
        let (Some(&object), Some(&other)) = (mine.choose(rng), near.choose(rng)) else { return false };
        self.held[object] = Some(other);
        let [from, to] = [actor, other].map(|actor| capital(ACTORS[actor]));
        self.facts.push(format!("{from} gave the {} to {to}.", OBJECTS[object]));
        self.gives.push((actor, object, other, self.facts.len()));
        true
    }

    /// Something happens: a move, or with objects a take, a drop or a give.
    fn step(&mut self, task: BabiTask, rng: &mut ChaCha8Rng) {
        let actor = rng.random_range(0..ACTORS.len());
        let done = match (task, rng.random_range(0..4)) {
            (BabiTask::Qa2 | BabiTask::Qa3, 0 | 1) | (BabiTask::Qa5, 0) => self.takes_or_drops(actor, rng),
            (BabiTask::Qa5, 1 | 2) => self.gives(actor, rng),
            _ => false,
        };
        if !done {
            self.moves(actor, rng);
        }
    }
}

/// A story of a task, of at most so many facts.
pub(super) fn story(task: BabiTask, most: usize, rng: &mut ChaCha8Rng) -> Story {
    if task == BabiTask::Qa4 {
        return directions(rng);
    }
    loop {
        let (mut world, mut found) = (World::new(), None);
        let wanted = match task {
            BabiTask::Qa1 => 2 * rng.random_range(1..=5),
            _ => rng.random_range(4..=40),
        };
        while world.facts.len() < most.min(MOST) && found.is_none() {
            world.step(task, rng);
            if world.facts.len() >= wanted.min(most) {
                found = ask(task, &world, rng);
            }
        }
        if let Some((question, answer)) = found {
            return Story { task, facts: world.facts, question, answer };
        }
    }
}

/// A question that the facts so far answer.
fn ask(task: BabiTask, world: &World, rng: &mut ChaCha8Rng) -> Option<(String, &'static str)> {
    let object = rng.random_range(0..OBJECTS.len());
    match task {
        BabiTask::Qa1 => {
            let actor = rng.random_range(0..ACTORS.len());
            Some((format!("Where is {}?", capital(ACTORS[actor])), PLACES[world.at[actor]?]))
        }
        BabiTask::Qa2 => Some((format!("Where is the {}?", OBJECTS[object]), PLACES[*world.ways[object].last()?])),
        BabiTask::Qa3 => {
            let [.., before, last] = world.ways[object][..] else { return None };
            // The last two places: another visit to the last one would be another answer.
            let earlier = world.ways[object].iter().filter(|&&place| place == last).count();
            let question = format!("Where was the {} before the {}?", OBJECTS[object], PLACES[last]);
            (earlier == 1).then_some((question, PLACES[before]))
        }
        BabiTask::Qa5 => {
            let &(giver, object, receiver, after) = world.gives.last()?;
            // One that no other give contradicts, up to five facts back.
            let alone = |same: &dyn Fn(&Give) -> bool| world.gives.iter().filter(|give| same(give)).count() == 1;
            if world.facts.len() - after > 5 {
                return None;
            }
            let [from, what, to] = [capital(ACTORS[giver]), OBJECTS[object].to_owned(), capital(ACTORS[receiver])];
            match rng.random_range(0..3) {
                0 if alone(&|give| give.1 == object && give.2 == receiver) => {
                    Some((format!("Who gave the {what} to {to}?"), ACTORS[giver]))
                }
                1 if alone(&|give| give.0 == giver && give.1 == object) => {
                    Some((format!("Who did {from} give the {what} to?"), ACTORS[receiver]))
                }
                2 if alone(&|give| give.0 == giver && give.2 == receiver) => {
                    Some((format!("What did {from} give to {to}?"), OBJECTS[object]))
                }
                _ => None,
            }
        }
        BabiTask::Qa4 => None,
    }
}

fn capital(name: &str) -> String {
    name[..1].to_uppercase() + &name[1..]
}

/// Three places in a line, two facts in either order, one question in either direction.
fn directions(rng: &mut ChaCha8Rng) -> Story {
    let places = some(&PLACES, 3, rng);
    let ways = if rng.random() { ["north", "south"] } else { ["east", "west"] };
    let fact = |pair: &[&str]| format!("The {} is {} of the {}.", pair[0], ways[0], pair[1]);
    let mut facts: Vec<String> = places.windows(2).map(fact).collect();
    if rng.random() {
        facts.reverse();
    }
    // Which of the two neighbours, and seen from which of them.
    let at = rng.random_range(0..2);
    let (first, second) = (places[at], places[at + 1]);
    let (question, answer) = match rng.random() {
        true => (format!("What is {} of the {second}?", ways[0]), first),
        false => (format!("What is {} of the {first}?", ways[1]), second),
    };
    Story { task: BabiTask::Qa4, facts, question, answer }
}

/// A story among so many sentences of background: its facts in their order at random gaps.
pub(super) fn question(story: &Story, units: usize, rng: &mut ChaCha8Rng, sentences: &[String]) -> TextQuestion {
    let first = rng.random_range(0..sentences.len().max(1));
    let mut gaps: Vec<usize> = story.facts.iter().map(|_| rng.random_range(0..=units)).collect();
    gaps.sort_unstable();
    let mut facts = gaps.into_iter().zip(&story.facts).peekable();
    let mut text: Vec<String> = Vec::with_capacity(units + story.facts.len());
    for at in 0..=units {
        while let Some((_, fact)) = facts.next_if(|(gap, _)| *gap <= at) {
            text.push(fact.clone());
        }
        if at < units {
            text.push(background(at, first, sentences, rng));
        }
    }
    let labels: Vec<&str> = match story.task {
        BabiTask::Qa5 => ACTORS.iter().chain(&OBJECTS).copied().collect(),
        _ => PLACES.to_vec(),
    };
    TextQuestion {
        prompt: format!("{}\n{}\nQuestion: {}\nAnswer:", story.task.instruction(), text.join(" "), story.question),
        answer: format!(" {}", story.answer),
        generate: GENERATE,
        scoring: Scoring::Label {
            labels: labels.into_iter().map(str::to_owned).collect(),
            question: story.question.clone(),
            target: story.answer.to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::generator;

    fn stories(task: BabiTask) -> Vec<Story> {
        (0..300).map(|index| story(task, 128, &mut generator(9, index))).collect()
    }

    #[test]
    fn places_follow_from_the_facts() {
        for Story { facts, question, answer, .. } in stories(BabiTask::Qa1) {
            let who = question.trim_start_matches("Where is ").trim_end_matches('?').to_owned();
            let last = facts.iter().rfind(|fact| fact.starts_with(&who));
            assert!(last.is_some_and(|fact| fact.ends_with(&format!("{answer}."))), "{facts:?} {question} {answer}");
        }
        // A second simulator: objects follow their holders.
        for (task, index) in [(BabiTask::Qa2, 1), (BabiTask::Qa3, 2)] {
            for Story { facts, question, answer, .. } in stories(task) {
                let object = OBJECTS.iter().find(|object| question.contains(*object)).copied().unwrap_or_default();
                let (mut places, mut holder, mut way) = (std::collections::BTreeMap::new(), None, Vec::new());
                for fact in &facts {
                    let words: Vec<&str> = fact.trim_end_matches('.').split(' ').collect();
                    let (who, thing) = (words[0], words[words.len() - 1]);
                    match words[1] {
                        "went" => _ = places.insert(who, thing),
                        "took" if thing == object => holder = Some(who),
                        "put" if thing == object => holder = None,
                        _ => {}
                    }
                    if let Some(place) = holder.and_then(|holder| places.get(holder))
                        && way.last() != Some(place)
                    {
                        way.push(*place);
                    }
                }
                assert_eq!(way.iter().rev().nth(index - 1).copied(), Some(answer), "{facts:?} {question}");
            }
        }
    }

    #[test]
    fn gives_and_directions_follow_from_the_facts() {
        for Story { facts, question, answer, .. } in stories(BabiTask::Qa5) {
            let words: Vec<&str> = question.trim_end_matches('?').split(' ').collect();
            let name = capital(answer);
            let [from, what, to] = match words[..] {
                ["Who", "gave", "the", what, "to", to] => [name.as_str(), what, to],
                ["Who", "did", from, "give", "the", what, "to"] => [from, what, name.as_str()],
                ["What", "did", from, "give", "to", to] => [from, answer, to],
                _ => panic!("{question}"),
            };
            let fact = format!("{from} gave the {what} to {to}.");
            assert_eq!(facts.iter().filter(|other| **other == fact).count(), 1, "{facts:?} {question} {answer}");
            assert!(!question.to_lowercase().contains(answer), "{question} {answer}");
        }
        for Story { facts, question, answer, .. } in stories(BabiTask::Qa4) {
            let other = PLACES.iter().find(|place| question.contains(*place)).copied().unwrap_or_default();
            let both = facts.iter().filter(|fact| fact.contains(answer) && fact.contains(other)).count();
            assert_eq!((facts.len(), both), (2, 1), "{facts:?} {question} {answer}");
        }
    }
}

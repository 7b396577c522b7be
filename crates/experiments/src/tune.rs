//! `[tune]`: every arm tries the same settings, drawn from the same ranges, with the same budget, and the one that does best on
//! the selection half of the held-out batches is trained anew with the comparison's seeds and reported on the other half.
//!
//! `[sweep]` is the same for lists that are tried in all combinations with all seeds, without training the chosen one anew.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use toml::Value;

use polyhead_models::ConfigError;
use polyhead_recipe::in_words;

/// More trials than anybody pays for; chosen by us.
const MOST_TRIALS: usize = 1000;
/// Draws until a new setting must have come; chosen by us.
const DRAWS: usize = 10_000;
/// The outer share of a range, on its scale, that counts as its edge; chosen by us.
const EDGE: f64 = 0.05;

/// How every arm is tuned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tune {
    /// Settings that every arm tries.
    pub trials: usize,
    /// "random" (default) draws settings from the ranges; "grid" tries all combinations, with as many evenly spaced values of each
    /// range as make up the trials.
    #[serde(default)]
    pub search: Search,
    /// Keys with what each may be: a list of values, or `{ low = 1e-4, high = 1e-2 }`, with `scale = "linear"` where not the
    /// logarithm is to be uniform; whole numbers where both ends are.
    #[schemars(with = "serde_json::Map<String, serde_json::Value>")]
    pub ranges: toml::Table,
    /// Seeds that every setting is tried with. Default: two, those behind the largest of the comparison's, so that what is reported
    /// shares no luck with what was chosen. With one, what tuning leaves to luck may pass for a difference (chosen by simulation).
    #[serde(default)]
    pub seeds: Vec<u64>,
    /// Decides which settings "random" draws. Default: 0.
    #[serde(default)]
    pub draw: u64,
}

/// How settings to try are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Search {
    /// Drawn.
    #[default]
    Random,
    /// All combinations.
    Grid,
}

/// A setting to try: keys with values.
pub type Values = Vec<(String, Value)>;

/// What a key may be.
enum Range {
    List(Vec<Value>),
    Between { low: f64, high: f64, log: bool, whole: bool },
}

/// A range as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Bounds {
    low: Number,
    high: Number,
    #[serde(default)]
    scale: Scale,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Number {
    Whole(i64),
    Real(f64),
}

#[derive(Clone, Copy, PartialEq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Scale {
    #[default]
    Log,
    Linear,
}

impl Number {
    fn value(self) -> f64 {
        match self {
            Self::Whole(number) => number as f64,
            Self::Real(number) => number,
        }
    }
}

impl Range {
    fn read(key: &str, value: &Value) -> Result<Self, String> {
        match value {
            Value::Array(list) if !list.is_empty() => Ok(Self::List(list.clone())),
            Value::Table(_) => {
                let Bounds { low, high, scale } = value
                    .clone()
                    .try_into()
                    .map_err(|error: toml::de::Error| format!("{key}: {}", in_words(error.message())))?;
                let whole = matches!((low, high), (Number::Whole(_), Number::Whole(_)));
                let (low, high, log) = (low.value(), high.value(), scale == Scale::Log);
                if !(low.is_finite() && high.is_finite() && low < high) {
                    return Err(format!("{key}: low ({low}) must be below high ({high}), both finite"));
                }
                if log && low <= 0.0 {
                    return Err(format!(
                        "{key}: low ({low}) must be above 0 on a logarithmic scale; scale = \"linear\" takes any numbers"
                    ));
                }
                Ok(Self::Between { low, high, log, whole })
            }
            _ => Err(format!("{key} must be a list of values, or {{ low = 1e-4, high = 1e-2 }}")),
        }
    }

    /// The value at a share of the way through a range of numbers; of a list, the one there.
    fn at(&self, share: f64) -> Value {
        match *self {
            Self::List(ref list) => list[((share * list.len() as f64) as usize).min(list.len() - 1)].clone(),
            Self::Between { low, high, log, whole } => {
                let value = match log {
                    true => (low.ln() + share * (high.ln() - low.ln())).exp(),
                    false => low + share * (high - low),
                };
                match whole {
                    true => Value::Integer(value.round() as i64),
                    // Three digits can be read, and typed again.
                    false => Value::Float(format!("{value:.2e}").parse().unwrap_or(value).clamp(low, high)),
                }
            }
        }
    }

    /// So many values, evenly spaced, both ends among them.
    fn spaced(&self, count: usize) -> Vec<Value> {
        match self {
            Self::List(list) => list.clone(),
            Self::Between { .. } => (0..count).map(|at| self.at(at as f64 / (count - 1) as f64)).collect(),
        }
    }

    /// How many values there are; `None` for all numbers between two.
    fn size(&self) -> Option<usize> {
        match self {
            Self::List(list) => Some(list.len()),
            Self::Between { low, high, whole: true, .. } => Some((high - low) as usize + 1),
            Self::Between { .. } => None,
        }
    }

    /// How far through the range a value is, on its scale; `None` of a list.
    fn share(&self, value: f64) -> Option<f64> {
        match *self {
            Self::List(_) => None,
            Self::Between { low, high, log: true, .. } => Some((value.ln() - low.ln()) / (high.ln() - low.ln())),
            Self::Between { low, high, .. } => Some((value - low) / (high - low)),
        }
    }
}

impl Tune {
    /// Seeds that trials are trained with, in a comparison with these seeds.
    pub fn seeds(&self, reported: &[u64]) -> Vec<u64> {
        match self.seeds.is_empty() {
            true => {
                let last = reported.iter().max().copied().unwrap_or_default();
                // Seeds in recipes are whole numbers of TOML; in front of the largest there is room.
                let beyond = i64::MAX as u64 - 2 >= last;
                let free = (0..).filter(|seed| !reported.contains(seed));
                if beyond { vec![last + 1, last + 2] } else { free.take(2).collect() }
            }
            false => self.seeds.clone(),
        }
    }

    fn ranges(&self) -> Result<Vec<(String, Range)>, String> {
        let leaves = leaves(&self.ranges, &|table| table.contains_key("low") || table.contains_key("high"));
        leaves.into_iter().map(|(key, value)| Ok((key.clone(), Range::read(&key, value)?))).collect()
    }

    /// The settings that every arm tries.
    ///
    /// # Errors
    /// What is wrong with the ranges or the number of trials, with the key it is about.
    pub fn trials(&self) -> Result<Vec<Values>, ConfigError> {
        let wrong = |key: &str, message: String| ConfigError::new(key, format!("tune: {message}"));
        let ranges = self.ranges().map_err(|message| wrong("tune.ranges", message))?;
        if ranges.is_empty() {
            return Err(wrong("tune.ranges", "ranges is empty: name a key to tune, such as optimizer.adamw.lr".into()));
        }
        if !(1..=MOST_TRIALS).contains(&self.trials) {
            return Err(wrong("tune.trials", format!("trials ({}) must be 1 to {MOST_TRIALS}", self.trials)));
        }
        for (at, seed) in self.seeds.iter().enumerate() {
            if self.seeds[..at].contains(seed) {
                return Err(wrong("tune.seeds", format!("seeds: {seed} is there twice")));
            }
        }
        let found = match self.search {
            Search::Grid => self.grid(&ranges),
            Search::Random => self.drawn(&ranges),
        };
        found.map_err(|message| wrong("tune.trials", message))
    }

    fn grid(&self, ranges: &[(String, Range)]) -> Result<Vec<Values>, String> {
        let lists = ranges.iter().filter_map(|(_, range)| match range {
            Range::List(list) => Some(list.len()),
            Range::Between { .. } => None,
        });
        let (listed, open) = (lists.clone().product::<usize>(), ranges.len() - lists.count());
        let points = |each: usize| each.checked_pow(open as u32).and_then(|all| all.checked_mul(listed));
        let each = match open {
            0 => (listed == self.trials).then_some(1),
            _ => (2..=self.trials).find(|&each| points(each) == Some(self.trials)),
        };
        let Some(each) = each else {
            let possible: Vec<String> = match open {
                0 => vec![listed.to_string()],
                _ => (2..5).filter_map(points).map(|count| count.to_string()).collect(),
            };
            let possible = possible.join(", ");
            return Err(format!(
                "trials ({}) does not fit a grid of {} keys: {possible}{} would",
                self.trials,
                ranges.len(),
                if open == 0 { "" } else { ", ..." }
            ));
        };
        let grid = ranges.iter().fold(vec![Vec::new()], |found: Vec<Values>, (key, range)| {
            let values = range.spaced(each);
            let longer =
                |one: &Values, value: &Value| one.iter().cloned().chain([(key.clone(), value.clone())]).collect();
            found.iter().flat_map(|one| values.iter().map(move |value| longer(one, value))).collect()
        });
        match (1..grid.len()).find(|&at| grid[..at].contains(&grid[at])) {
            Some(at) => {
                Err(format!("two points of the grid are {}: give fewer trials, or wider ranges", words(&grid[at])))
            }
            None => Ok(grid),
        }
    }

    fn drawn(&self, ranges: &[(String, Range)]) -> Result<Vec<Values>, String> {
        let all = ranges.iter().try_fold(1usize, |all, (_, range)| Some(all.saturating_mul(range.size()?)));
        if let Some(all) = all.filter(|&all| all < self.trials) {
            return Err(format!(
                "trials ({}) is more than the {all} settings that there are; search = \"grid\" tries all of them",
                self.trials
            ));
        }
        let mut rng = ChaCha8Rng::seed_from_u64(self.draw);
        let mut trials: Vec<Values> = Vec::new();
        for _ in 0..self.trials {
            let mut draw = || ranges.iter().map(|(key, range)| (key.clone(), range.at(rng.random::<f64>()))).collect();
            let new = (0..DRAWS).map(|_| draw()).find(|drawn| !trials.contains(drawn));
            trials.push(new.ok_or_else(|| {
                format!("the ranges are too narrow for {} settings that differ in three digits", self.trials)
            })?);
        }
        Ok(trials)
    }
}

/// `key = value, key = value`.
pub fn words(values: &Values) -> String {
    values.iter().map(|(key, value)| format!("{key} = {value}")).collect::<Vec<_>>().join(", ")
}

/// The values in nested tables, with their dotted keys; `ends` says of a table that it is a value itself.
pub fn leaves<'a>(table: &'a toml::Table, ends: &dyn Fn(&toml::Table) -> bool) -> Vec<(String, &'a Value)> {
    table
        .iter()
        .flat_map(|(key, value)| match value {
            Value::Table(inner) if !ends(inner) => {
                leaves(inner, ends).into_iter().map(|(rest, value)| (format!("{key}.{rest}"), value)).collect()
            }
            value => vec![(key.clone(), value)],
        })
        .collect()
}

/// The setting that did best: the place of the best number; settings without one have failed. `None` where all have.
pub fn best(selection: &[Option<f64>], grows: bool) -> Option<usize> {
    let worth = |number: f64| if grows { -number } else { number };
    let known = selection.iter().enumerate().filter_map(|(at, number)| Some((at, worth((*number)?))));
    known.filter(|(_, worth)| !worth.is_nan()).min_by(|a, b| a.1.total_cmp(&b.1)).map(|(at, _)| at)
}

/// Where the chosen setting is at the edge of what was tried, in words, key by key: nothing better was found further inside, and
/// what is beyond was not tried.
pub fn edges(tune: Option<&Tune>, tried: &[Values], chosen: usize) -> Vec<String> {
    let number = |value: &Value| value.as_float().or(value.as_integer().map(|value| value as f64));
    let ranges = tune.and_then(|tune| tune.ranges().ok()).unwrap_or_default();
    let Some(own) = tried.get(chosen) else { return Vec::new() };
    let of_key = |(key, value): &(String, Value)| {
        let all = tried.iter().filter_map(|one| number(&one.iter().find(|(other, _)| other == key)?.1));
        let (low, high) = all.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
        let (at, range) = (number(value)?, ranges.iter().find(|(other, _)| other == key));
        let share = range.and_then(|(_, range)| range.share(at));
        let end = match share {
            _ if low == high => return None,
            _ if at == low => "the smallest",
            _ if at == high => "the largest",
            Some(share) if share <= EDGE => "near the lower end",
            Some(share) if share >= 1.0 - EDGE => "near the upper end",
            _ => return None,
        };
        Some(format!(
            "{key} = {value} is {end} of what was tried: the best may be beyond, and a wider range would tell"
        ))
    };
    own.iter().filter_map(of_key).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn tune(text: &str) -> Tune {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn a_grid_has_as_many_points_as_trials() {
        let both = "trials = 6\nsearch = \"grid\"\n[ranges]\noptimizer.adamw.lr = { low = 1e-4, high = 1e-2 }\n\
                    optimizer.adamw.weight_decay = [0.0, 0.1]";
        let found: Vec<String> = tune(both).trials().unwrap().iter().map(words).collect();
        let expected = [0.0001, 0.001, 0.01].map(|lr| {
            ["0.0", "0.1"].map(|decay| format!("optimizer.adamw.lr = {lr}, optimizer.adamw.weight_decay = {decay}"))
        });
        assert_eq!(found, expected.concat());
        let whole = "trials = 3\nsearch = \"grid\"\n[ranges]\na.b = { low = 2, high = 8, scale = \"linear\" }";
        assert_eq!(
            tune(whole).trials().unwrap().iter().map(words).collect::<Vec<_>>(),
            ["a.b = 2", "a.b = 5", "a.b = 8"]
        );
    }

    #[test]
    fn drawn_settings_are_inside_and_follow_from_the_seed() {
        let text =
            "trials = 200\n[ranges]\nlr = { low = 1e-4, high = 1e-2 }\nn = { low = 1, high = 300 }\nx = [\"a\", \"b\"]";
        let trials = tune(text).trials().unwrap();
        assert_eq!(trials, tune(text).trials().unwrap());
        assert_ne!(trials, tune(&text.replace("trials = 200", "trials = 200\ndraw = 1")).trials().unwrap());
        let rates: Vec<f64> = trials.iter().map(|one| one[0].1.as_float().unwrap()).collect();
        assert!(rates.iter().all(|rate| (1e-4..=1e-2).contains(rate)));
        // The logarithm is uniform: half of the rates are below the geometric middle.
        let below = rates.iter().filter(|rate| **rate < 1e-3).count();
        assert!((80..120).contains(&below), "{below}");
        assert!(trials.iter().all(|one| (1..=300).contains(&one[1].1.as_integer().unwrap()) && one[2].1.is_str()));
        // More trials keep the first ones.
        assert_eq!(tune(&text.replace("200", "10")).trials().unwrap(), trials[..10]);
    }

    #[test]
    fn what_cannot_be_tuned_is_refused() {
        for (text, told) in [
            ("trials = 4\n[ranges]", "ranges is empty"),
            ("trials = 0\n[ranges]\na = [1]", "trials (0) must be 1 to 1000"),
            ("trials = 4\n[ranges]\na = 3", "a must be a list of values"),
            ("trials = 4\n[ranges]\na = []", "a must be a list of values"),
            ("trials = 4\n[ranges]\na = { low = 0.0, high = 1.0 }", "low (0) must be above 0"),
            ("trials = 4\n[ranges]\na = { low = 2.0, high = 1.0 }", "low (2) must be below high (1)"),
            ("trials = 4\n[ranges]\na = { low = nan, high = 1.0 }", "must be below high"),
            ("trials = 4\n[ranges]\na = { low = 1.0, hihg = 2.0 }", "hihg"),
            ("trials = 4\n[ranges]\na = { low = 1.0 }", "high"),
            ("trials = 4\n[ranges]\na = [1, 2]", "more than the 2 settings"),
            ("trials = 4\nseeds = [1, 1]\n[ranges]\na = [1, 2, 3, 4]", "1 is there twice"),
            (
                "trials = 5\nsearch = \"grid\"\n[ranges]\na = [1, 2]\nb = { low = 1.0, high = 2.0 }",
                "4, 6, 8, ... would",
            ),
            ("trials = 5\nsearch = \"grid\"\n[ranges]\na = [1, 2]\nb = [1, 2]", "keys: 4 would"),
            ("trials = 9\nsearch = \"grid\"\n[ranges]\nb = { low = 1, high = 3 }", "two points of the grid are b = 1"),
        ] {
            let error = tune(text).trials().unwrap_err();
            assert!(error.problem.contains(told) && error.field.starts_with("tune."), "{text}: {}", error.problem);
        }
    }

    #[test]
    fn the_best_is_chosen_and_failures_are_not() {
        assert_eq!(best(&[Some(2.0), None, Some(1.0), Some(1.0), Some(f64::NAN)], false), Some(2));
        assert_eq!(best(&[Some(0.2), None, Some(0.1)], true), Some(0));
        assert_eq!(best(&[None, None], false), None);
    }

    #[test]
    fn a_choice_at_the_edge_is_told() {
        let grid = tune("trials = 5\nsearch = \"grid\"\n[ranges]\nlr = { low = 1e-4, high = 1.0 }");
        let tried = grid.trials().unwrap();
        let told = |chosen: usize| edges(Some(&grid), &tried, chosen).join("; ");
        assert!(told(0).contains("lr = 0.0001 is the smallest") && told(4).contains("lr = 1.0 is the largest"));
        assert_eq!((told(1), told(2), told(3)), (String::new(), String::new(), String::new()));
        // Of lists too, but not of words or of a key with one value.
        let listed: Vec<Values> =
            [1, 2, 4].map(|n| vec![("n".into(), n.into()), ("x".into(), "a".into()), ("y".into(), 3.into())]).into();
        assert!(edges(None, &listed, 2)[0].starts_with("n = 4 is the largest") && edges(None, &listed, 2).len() == 1);
        assert!(edges(None, &listed, 1).is_empty());
        // A drawn value need not be the last one to be at the end of its range.
        let near: Vec<Values> = [0.97, 0.99, 0.01].map(|x| vec![("lr".into(), Value::Float(x))]).into();
        let linear = tune("trials = 3\n[ranges]\nlr = { low = 0.0, high = 1.0, scale = \"linear\" }");
        assert!(edges(Some(&linear), &near, 0)[0].contains("near the upper end"));
    }
}

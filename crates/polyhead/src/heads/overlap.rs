//! `polyhead heads overlap`: how many heads the circuits of two behaviours share (Merullo et al. 2023, arXiv 2310.08744).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::Args;
use polyhead_evaluation::head_sets::{HeadOf, largest, overlap as shared, random};
use polyhead_recipe::Problems;
use polyhead_runs::Failure;
use serde_json::{Value, json};

use super::decisions::{count_of, share};
use super::{mean, named};
use crate::console::{put, talk};

/// Sets of random heads that an overlap is compared with; chosen by us.
const DRAWS: u64 = 100;

/// Which results.
#[derive(Debug, Args)]
pub struct OverlapArgs {
    /// Two JSON files that `heads` wrote for the same model.
    #[arg(num_args = 2, required = true, value_name = "RESULT")]
    results: Vec<PathBuf>,
    /// The share of heads that is compared, the largest by size.
    #[arg(long, default_value_t = 0.1, value_parser = share)]
    share: f64,
    /// The column that is compared, or one of each result: effect,node. Default: effect, else the first that both have, else the
    /// first of each.
    #[arg(long, value_delimiter = ',', num_args = 1, value_name = "COLUMN")]
    column: Vec<String>,
}

/// The heads of a result with their numbers, by the name of the column.
struct Heads {
    path: PathBuf,
    rows: Vec<(HeadOf, serde_json::Map<String, Value>)>,
}

impl Heads {
    fn read(path: &Path) -> Result<Self, Failure> {
        let text = std::fs::read_to_string(path).map_err(|error| Failure::file("read", path, error))?;
        let wrong = |problem: &str| {
            Failure::Run(format!("{}: {problem}: it must be a JSON file that `heads` wrote", path.display()))
        };
        let value: Value = serde_json::from_str(&text).map_err(|error| wrong(&format!("invalid JSON: {error}")))?;
        let rows = value["heads"].as_array().filter(|rows| !rows.is_empty()).ok_or_else(|| wrong("it has no heads"))?;
        let row = |row: &Value| -> Result<_, Failure> {
            let place = row["layer"]
                .as_u64()
                .zip(row["head"].as_u64())
                .ok_or_else(|| wrong("a head has no layer or no number"))?;
            let numbers = row.as_object().cloned().unwrap_or_default();
            Ok(((place.0 as usize, place.1 as usize), numbers))
        };
        Ok(Self { path: path.to_owned(), rows: rows.iter().map(row).collect::<Result<_, Failure>>()? })
    }

    fn columns(&self) -> Vec<&String> {
        let given = self.rows[0].1.keys().filter(|name| !["layer", "head"].contains(&name.as_str()));
        given.collect()
    }

    fn scores(&self, column: &str) -> Result<Vec<(HeadOf, f64)>, Failure> {
        let missing = || {
            let has = self.columns().into_iter().cloned().collect::<Vec<_>>().join(", ");
            Problems::plain(format!("{} has no numbers in {column}; it has {has}", self.path.display()))
        };
        let one = |(head, numbers): &(HeadOf, serde_json::Map<String, Value>)| {
            let number = numbers.get(column).and_then(Value::as_f64);
            number.map(|number| (*head, number.abs())).ok_or_else(|| Failure::from(missing()))
        };
        self.rows.iter().map(one).collect()
    }
}

impl OverlapArgs {
    /// The column of each result.
    fn columns(&self, a: &Heads, b: &Heads) -> Result<[String; 2], Failure> {
        let ([a, b], effect) = ([a.columns(), b.columns()], "effect");
        let common =
            a.iter().find(|name| **name == effect && b.contains(name)).or(a.iter().find(|name| b.contains(name)));
        match (&self.column[..], common) {
            ([both], _) => Ok([both.clone(), both.clone()]),
            ([first, second], _) => Ok([first.clone(), second.clone()]),
            ([], Some(common)) => Ok([common, common].map(|name| (*name).clone())),
            ([], None) => Ok([a, b].map(|of| of.first().map_or_else(String::new, |name| (*name).clone()))),
            _ => Err(Problems::plain(format!("--column: {} columns for two results", self.column.len())).into()),
        }
    }
}

/// Prints what both have in common.
pub fn overlap(args: &OverlapArgs) -> Result<(), Failure> {
    let [a, b] = [Heads::read(&args.results[0])?, Heads::read(&args.results[1])?];
    let places = |of: &Heads| of.rows.iter().map(|(head, _)| *head).collect::<BTreeSet<_>>();
    if places(&a) != places(&b) {
        let [first, second] = [&a, &b].map(|of| of.path.display());
        return Err(
            Problems::plain(format!("{first} and {second} are of other heads: give two results of one model")).into()
        );
    }
    let columns = args.columns(&a, &b)?;
    let [of_a, of_b] = [a.scores(&columns[0])?, b.scores(&columns[1])?];
    let count = count_of(args.share, of_a.len());
    let sets = [&of_a, &of_b].map(|scores| largest(scores, count));
    let [jaccard, both] = shared(&sets[0], &sets[1]);
    let all: Vec<HeadOf> = of_a.iter().map(|(head, _)| *head).collect();
    let by_chance = |seed: u64| shared(&sets[0], &random(&all, count, seed))[1];
    let chance = mean(&(0..DRAWS).map(by_chance).collect::<Vec<_>>());
    let names = |set: &BTreeSet<HeadOf>| set.iter().map(|&head| named(head)).collect::<Vec<_>>();
    let together: BTreeSet<HeadOf> = sets[0].intersection(&sets[1]).copied().collect();
    put!(
        "{:#}",
        json!({ "columns": columns, "heads": count, "overlap": both, "jaccard": jaccard, "overlap_of_random_heads": chance,
            "in_both": names(&together), "first": names(&sets[0]), "second": names(&sets[1]) })
    )?;
    talk!(
        "{:.0} % of the {count} largest heads by {} are in both; of as many random ones {:.0} %",
        100.0 * both,
        if columns[0] == columns[1] { columns[0].clone() } else { columns.join(" and ") },
        100.0 * chance
    );
    Ok(())
}

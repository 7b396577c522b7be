//! `recipes/results/*.json`, what comparisons measured, and the replication table that is made from them.
//!
//! Numbers are written by `compare --record`; the verdict of each claim by a person. A verdict is about numbers: where
//! they change, it is taken away and has to be written anew.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use polyhead_training::checkpoint::now_utc;
use polyhead_training::run_folder::atomic_write;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use polyhead_runs::Failure;
use polyhead_runs::data::project_root;
use polyhead_runs::result::Environment;
use polyhead_runs::text::thousands;

use super::comparison::Looked;
use super::extra_metrics::further;
use super::markdown::cell;
use super::metric::METRICS;
use super::outcome::Outcome;
use super::statistics::Summary;

/// What a comparison measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The comparison's file.
    pub comparison: String,
    /// When it was recorded, in UTC.
    pub recorded: String,
    /// What was learned from.
    pub data: String,
    /// Input tokens of a run.
    pub tokens_per_run: u64,
    /// One run of each arm a seed.
    pub seeds: Vec<u64>,
    /// What was compared.
    pub arms: Vec<RecordedArm>,
    /// Where.
    pub environments: Vec<Environment>,
    /// What others found, and what we say to it.
    pub claims: Vec<RecordedClaim>,
}

/// An arm with its numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RecordedArm {
    /// Its name.
    pub name: String,
    /// Which value of a sweep was chosen; empty where there was none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub choice: String,
    /// By number, one value a seed; null where the run failed.
    pub values: BTreeMap<String, Vec<Option<f64>>>,
}

/// A claim with our verdict.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RecordedClaim {
    /// What they found.
    pub claim: String,
    /// Where.
    pub paper: String,
    /// What their code does.
    pub code: String,
    /// The arms that show it; the first one is what the others are compared with.
    pub arms: Vec<String>,
    /// What is looked at.
    pub metric: Looked,
    /// What the numbers say, in a person's words.
    pub verdict: String,
}

/// The schema of the file.
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(Record).to_value()
}

/// Writes what a comparison measured; gives the file.
///
/// # Errors
/// If a file cannot be read or written.
pub fn write(outcome: &Outcome, tell: fn(&str)) -> Result<PathBuf, Failure> {
    let folder = Path::new(FOLDER);
    let path = folder.join(format!("{}.json", outcome.name));
    let before = if path.exists() { Some(read(&path)?) } else { None };
    let mut record = record(outcome)?;
    for claim in &mut record.claims {
        let old = before.as_ref().and_then(|before| {
            let same = before.claims.iter().find(|old| old.claim == claim.claim && old.arms == claim.arms)?;
            let numbers = |record: &[RecordedArm]| judged(record, claim);
            (numbers(&before.arms) == numbers(&record.arms)).then(|| same.verdict.clone())
        });
        claim.verdict = old.unwrap_or_default();
        if claim.verdict.is_empty() {
            tell(&format!("verdict  to be written into {}: {}", path.display(), claim.claim));
        }
    }
    std::fs::create_dir_all(folder).map_err(|error| Failure::file("create", folder, error))?;
    let text = serde_json::to_string_pretty(&record).map_err(|error| Failure::Run(error.to_string()))?;
    atomic_write(&path, format!("{text}\n").as_bytes())?;
    Ok(path)
}

/// Where records are, from the project's root; written from the folder that the command is called in.
const FOLDER: &str = "recipes/results";

fn record(outcome: &Outcome) -> Result<Record, Failure> {
    let first =
        outcome.results().next().ok_or_else(|| Failure::Run("no run has finished: nothing to record".into()))?;
    let more = further(outcome);
    let arms = outcome.arms.iter().enumerate().map(|(at, arm)| {
        let every = METRICS.iter().map(|metric| (&metric.key, outcome.values(at, metric)));
        let more = more.iter().map(|further| (&further.metric.key, further.values[at].clone()));
        let values = every.chain(more).filter_map(|(key, found)| {
            let of_seed = |seed: &u64| found.iter().find(|(other, _)| other == seed).map(|(_, value)| *value);
            let list = outcome.comparison.seeds.iter().map(of_seed).collect();
            (!found.is_empty()).then(|| (key.to_string(), list))
        });
        RecordedArm { name: arm.name.clone(), choice: arm.choice.clone(), values: values.collect() }
    });
    let claims = outcome.comparison.claim.iter().map(|claim| RecordedClaim {
        claim: claim.claim.clone(),
        paper: claim.paper.clone(),
        code: claim.code.clone(),
        arms: claim.arms.clone(),
        metric: claim.metric.clone().unwrap_or(Looked::Quality(outcome.comparison.metric)),
        verdict: String::new(),
    });
    Ok(Record {
        comparison: outcome.file.clone(),
        recorded: now_utc(),
        data: first.data.clone(),
        tokens_per_run: first.tokens,
        seeds: outcome.comparison.seeds.clone(),
        arms: arms.collect(),
        environments: outcome.environments().into_iter().cloned().collect(),
        claims: claims.collect(),
    })
}

/// What a verdict is about: the scores of its arms, and the number that it looks at.
fn judged(arms: &[RecordedArm], claim: &RecordedClaim) -> Vec<Option<Vec<Vec<Option<f64>>>>> {
    let looked = claim.metric.metric();
    let keys = || METRICS[..3].iter().map(|metric| &*metric.key).chain([&*looked.key]);
    let of = |name: &String| {
        let arm = arms.iter().find(|arm| arm.name == *name)?;
        Some(keys().filter_map(|key| arm.values.get(key).cloned()).collect())
    };
    claim.arms.iter().map(of).collect()
}

fn read(path: &Path) -> Result<Record, Failure> {
    let bytes = std::fs::read(path).map_err(|error| Failure::file("read", path, error))?;
    serde_json::from_slice(&bytes).map_err(|error| Failure::Run(format!("{}: {error}", path.display())))
}

/// Every recorded comparison, by its file.
///
/// # Errors
/// If a file cannot be read.
pub fn read_all() -> Result<BTreeMap<PathBuf, Record>, Failure> {
    let folder = project_root().join(FOLDER);
    let entries = std::fs::read_dir(&folder).map_err(|error| Failure::file("read", &folder, error))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>, std::io::Error>>()?;
    paths.retain(|path| path.extension().is_some_and(|ending| ending == "json"));
    paths.into_iter().map(|path| Ok((path.clone(), read(&path)?))).collect()
}

/// The replications as Markdown: a section for each recorded comparison, with its claims.
///
/// # Errors
/// If a file cannot be read, or names an arm that it does not have.
pub fn replications() -> Result<String, Failure> {
    let mut out = String::new();
    for (path, record) in read_all()? {
        let name = record.comparison.rsplit('/').next().unwrap_or_default();
        let parameters = record.arms.first().and_then(|arm| *arm.values.get("parameters")?.first()?);
        let parameters = parameters.map_or(String::new(), |count| format!(", {} parameters", thousands(count as u64)));
        let data = record.data.split(": ").next().unwrap_or_default();
        let _ = write!(
            out,
            "\n## {}\n\n`polyhead compare recipes/compare/{name}`: {data}{parameters}, {} tokens a run\n",
            name.trim_end_matches(".toml"),
            thousands(record.tokens_per_run)
        );
        for claim in &record.claims {
            let told =
                told(&record, claim).map_err(|problem| Failure::Run(format!("{}: {problem}", path.display())))?;
            out.push_str(&told);
        }
    }
    Ok(out)
}

/// A claim with its numbers and our verdict.
fn told(record: &Record, claim: &RecordedClaim) -> Result<String, String> {
    let metric = claim.metric.metric();
    let values = |name: &String| -> Result<&Vec<Option<f64>>, String> {
        let arm = record.arms.iter().find(|arm| arm.name == *name);
        let arm =
            arm.ok_or_else(|| format!("the claim \"{}\" names the arm \"{name}\", which is not there", claim.claim))?;
        arm.values.get(&*metric.key).ok_or_else(|| format!("the arm \"{name}\" has no {}", metric.key))
    };
    let signed = |value: f64| format!("{:+.*}", metric.decimals, value * metric.factor);
    let code = if claim.code.is_empty() { String::new() } else { format!(" Code: {}.", claim.code) };
    let verdict = if claim.verdict.is_empty() { "not judged yet" } else { &claim.verdict };
    let mut out = format!("\n**{}.** {}.{code}\n\n**Verdict:** {verdict}.\n\n", claim.claim, claim.paper);
    let first = claim.arms.first().map(values).transpose()?.cloned().unwrap_or_default();
    let _ = writeln!(out, "| arm | {} | difference to the first |\n|---|---|---|", metric.label());
    for (at, name) in claim.arms.iter().enumerate() {
        let own = values(name)?;
        let finished: Vec<f64> = own.iter().copied().flatten().collect();
        let summary = Summary::of(&finished).ok_or_else(|| format!("no run of \"{name}\" has finished"))?;
        let deviation = summary.deviation.map_or(String::new(), |deviation| format!(" ± {}", metric.shown(deviation)));
        let measured = format!("{}{deviation} (n = {})", metric.shown(summary.mean), summary.n);
        let paired: Vec<f64> = own.iter().zip(&first).filter_map(|(own, first)| Some((*own)? - (*first)?)).collect();
        let difference = Summary::of(&paired).filter(|_| at > 0).map_or(String::new(), |difference| {
            let interval = difference.interval();
            let interval = interval.map_or("one seed, no interval".into(), |(low, high)| {
                format!("{} to {}; n = {}", signed(low), signed(high), difference.n)
            });
            format!("{} ({interval})", signed(difference.mean))
        });
        let _ = writeln!(out, "| {} | {measured} | {difference} |", cell(name));
    }
    Ok(out)
}

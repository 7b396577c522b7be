//! Tasks that trained runs are put to, each with `polyhead eval` in a process of its own. What came out is in the run's
//! folder, so that nothing is asked twice.

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};

use polyhead_training::run::Requests;
use serde_json::Value;

use polyhead_runs::Failure;
use polyhead_runs::result;

use super::outcome::Outcome;
use super::processes::{Jobs, Share, ended_without, run_jobs, spawn};

/// One task for one run.
struct Question {
    arm: usize,
    run: usize,
    flags: String,
    answer: PathBuf,
}

/// Puts every finished run of an outcome to the comparison's tasks.
///
/// # Errors
/// If a task fails, or a signal came.
pub fn evaluate(outcome: &mut Outcome, share: &Share, requests: &Requests, tell: fn(&str)) -> Result<(), Failure> {
    let questions = questions(outcome);
    let waiting: VecDeque<&Question> = questions.iter().filter(|question| !question.answer.exists()).collect();
    if !waiting.is_empty() {
        tell(&format!(
            "{} evaluations, {} of them have finished before",
            questions.len(),
            questions.len() - waiting.len()
        ));
    }
    let mut asking = Asking { waiting, failed: None, outcome, tell };
    run_jobs(&mut asking, share, requests)?;
    if let Some(problem) = asking.failed {
        return Err(Failure::Run(problem));
    }
    for Question { arm, run, answer, .. } in questions {
        outcome.arms[arm].runs[run].evaluated.extend(numbers(&read(&answer)?));
    }
    Ok(())
}

/// Questions that have no answer yet; after one that failed none is asked.
struct Asking<'a> {
    waiting: VecDeque<&'a Question>,
    failed: Option<String>,
    outcome: &'a Outcome,
    tell: fn(&str),
}

impl<'a> Jobs for Asking<'a> {
    type Job = &'a Question;

    fn next(&mut self) -> Option<&'a Question> {
        if self.failed.is_some() { None } else { self.waiting.pop_front() }
    }

    fn start(&mut self, question: &&'a Question, share: &Share) -> Result<Child, Failure> {
        question.ask(share)
    }

    fn ended(&mut self, question: &'a Question, status: ExitStatus, stopped: bool) -> Result<(), Failure> {
        let arm = &self.outcome.arms[question.arm];
        let name = format!("{}, seed {}", arm.name, arm.runs[question.run].seed);
        let part = question.answer.with_extension("part");
        match status.success() && read(&part).is_ok() {
            true => {
                std::fs::rename(part, &question.answer)?;
                (self.tell)(&format!("evaluated {name}: {}", question.flags));
            }
            false if stopped => {} // left
            false => {
                let problem = ended_without(status, &question.answer.with_extension("log"));
                self.failed = Some(format!("{name}: eval {}: {problem}", question.flags));
            }
        }
        Ok(())
    }
}

fn questions(outcome: &Outcome) -> Vec<Question> {
    let mut questions = Vec::new();
    for (arm, runs) in outcome.arms.iter().enumerate() {
        for (run, ended) in runs.runs.iter().enumerate().filter(|(_, ended)| ended.end.is_ok()) {
            for flags in &outcome.comparison.evaluate {
                let id = result::id(flags, ended.end.as_ref().ok().map(|result| result.id.as_str()));
                let answer = ended.folder.join(format!("evaluation-{}.json", &id[..8]));
                questions.push(Question { arm, run, flags: flags.clone(), answer });
            }
        }
    }
    questions
}

impl Question {
    fn ask(&self, share: &Share) -> Result<Child, Failure> {
        let part = self.answer.with_extension("part");
        let output = File::create(&part).map_err(|error| Failure::file("create", &part, error))?;
        let folder = self.answer.parent().map_or(String::new(), |folder| folder.display().to_string());
        let words = self.flags.split_whitespace().map(Into::into);
        let arguments: Vec<String> = ["eval".to_owned(), folder].into_iter().chain(words).collect();
        spawn(&arguments, &self.answer.with_extension("log"), Some(output), share)
    }
}

fn read(answer: &Path) -> Result<Value, Failure> {
    let text = std::fs::read_to_string(answer).map_err(|error| Failure::file("read", answer, error))?;
    serde_json::from_str(&text).map_err(|error| Failure::Run(format!("{}: {error}", answer.display())))
}

/// The numbers of what `eval` printed, by name: `needles_multi/4x`, `facts/wrong`, `eigenscore/ees`.
fn numbers(answer: &Value) -> Vec<(String, f64)> {
    let table = |prefix: &str, table: &Value| -> Vec<(String, f64)> {
        let entries = table.as_object().into_iter().flatten();
        entries.filter_map(|(name, value)| Some((format!("{prefix}/{name}"), value.as_f64()?))).collect()
    };
    let of_length = |row: &Value| {
        let (task, times) = (row["task"].as_str()?, row["times"].as_u64()?);
        Some((format!("{task}/{times}x"), row["accuracy"].as_f64()?))
    };
    let lengths = answer["results"].as_array().into_iter().flatten().filter_map(of_length);
    lengths.chain(table("facts", &answer["facts"])).chain(table("eigenscore", &answer["mean"])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_get_their_tasks_names() {
        let row = |times: u64, accuracy: f64| json!({ "task": "multi_hop", "times": times, "accuracy": accuracy });
        let found = numbers(&json!({ "seed": 3, "results": [row(1, 0.5), row(8, 0.25)] }));
        assert_eq!(found, [("multi_hop/1x".into(), 0.5), ("multi_hop/8x".into(), 0.25)]);
        assert_eq!(numbers(&json!({ "facts": { "wrong": 0.5, "ees": null } })), [("facts/wrong".to_owned(), 0.5)]);
        assert_eq!(numbers(&json!({ "mean": { "ees": -1.5 }, "seed": 0 })), [("eigenscore/ees".to_owned(), -1.5)]);
    }
}

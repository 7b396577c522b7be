//! `polyhead suite`: published suites of tasks, run under their settings.

mod asked;

use std::path::{Path, PathBuf};

use clap::Args;
use polyhead_experiments::runs;
use polyhead_experiments::suite_runs::plan::{Asked, PlannedPoint, SuitePlan, plan};
use polyhead_experiments::suite_runs::result::{
    REFERENCES, SuiteCell, SuiteResult, SuiteRow, data_hash, gather, references, references_folder,
};
use polyhead_experiments::suites::{SUITES, Suite};
use polyhead_recipe::Problems;
use polyhead_runs::Failure;
use polyhead_runs::result;
use polyhead_training::run_folder::{RunLock, files::RESULT};
use serde_json::{Value, json};

use super::compare::progress::Progress;
use crate::allowed::caller;
use crate::cli::JobsArgs;
use crate::console::{put, talk, thousands, wants_json};
use crate::signals;

/// Which suite, and how.
#[derive(Debug, Args)]
pub struct SuiteArgs {
    /// Its name, with its version.
    pub suite: Option<String>,
    /// Changes to every point, such as model.decoder.attention.softmax.n_heads=2.
    #[arg(value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// List all suites.
    #[arg(long, conflicts_with_all = ["suite", "check"])]
    pub list: bool,
    /// Run the fastest point of every stored reference (recipes/results/suites) again, or of that of the suite that is named.
    #[arg(long, conflicts_with_all = ["model", "only", "dry_run", "record", "seed"])]
    pub check: bool,
    /// A recipe whose [model] is trained instead of the published one; of a suite that asks trained models, the model: a run
    /// folder, a checkpoint, or a folder in Hugging Face's format.
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// Of a suite that asks trained models: lengths of the texts, in tokens. Default: the published ones.
    #[arg(long, value_delimiter = ',', requires = "model", value_parser = crate::cli::at_least_one)]
    pub lengths: Vec<usize>,
    /// Of a suite that asks trained models: questions for each task and length. Default: as many as were published.
    #[arg(long, requires = "model", value_parser = crate::cli::at_least_one)]
    pub samples: Option<usize>,
    /// Of a suite that asks trained models: a text file whose sentences are the background. Default: generated sentences.
    #[arg(long, requires = "model", value_name = "FILE")]
    pub background: Option<PathBuf>,
    /// Only points whose names contain this; may be given several times.
    #[arg(long, value_name = "WORDS")]
    pub only: Vec<String>,
    /// Decides weights and rows. Default: 0; of questions to trained models 42, as published.
    #[arg(long)]
    pub seed: Option<u64>,
    /// How trainings are started.
    #[command(flatten)]
    pub jobs: JobsArgs,
    /// Where runs and results are written. Default: checkpoints/suite/<name>.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Show the points with their parameters and steps. Nothing is written.
    #[arg(long)]
    pub dry_run: bool,
    /// Store the result in recipes/results/suites too, for --check.
    #[arg(long, conflicts_with = "dry_run")]
    pub record: bool,
    /// The same as training.device=... in every point.
    #[arg(long, value_parser = crate::cli::device())]
    pub device: Option<String>,
}

/// By how much a score may differ from the stored one when it is checked: other processors add up in another order, which early
/// steps enlarge. Chosen by us.
const TOLERANCE: f64 = 0.05;

/// Lists suites, runs one, or checks those that are stored.
///
/// # Errors
/// If a suite or a change is wrong, before anything is run; if runs failed, or scores are not the stored ones.
pub fn suite(args: &SuiteArgs) -> Result<(), Failure> {
    if args.list {
        return list();
    }
    if args.check {
        return check(args);
    }
    let Some(name) = &args.suite else {
        let problem =
            "name a suite\n  hint: `polyhead suite --list` lists all; --check runs a point of each stored one";
        return Err(Problems::plain(problem.into()).into());
    };
    let suite = Suite::find(name)?;
    if let Some(questions) = &suite.questions {
        return asked::ask(suite, questions, args);
    }
    if !args.lengths.is_empty() || args.samples.is_some() || args.background.is_some() {
        let flags = "--lengths, --samples and --background";
        return Err(
            Problems::plain(format!("{flags} are for suites that ask trained models; {name} trains its own")).into()
        );
    }
    let overrides = overrides(args);
    let (model, seed) = (args.model.as_deref(), args.seed.unwrap_or(0));
    let asked = Asked { suite, model, overrides: &overrides, only: &args.only, seed };
    let changed = asked.model.is_some() || !overrides.is_empty() || !args.only.is_empty();
    if args.record && changed {
        let problem = "--record stores a suite as it is: leave out --model, --only, --device and changes";
        return Err(Problems::plain(problem.into()).into());
    }
    let out = args.out.clone().unwrap_or_else(|| Path::new("checkpoints/suite").join(name));
    let planned = plan(&asked, &out, caller())?;
    if args.dry_run {
        return show(suite, &planned);
    }
    let reached = run(&asked, &planned, &out, &args.jobs)?;
    talk!("\nresult   {}", out.join(RESULT).display());
    print_result(&reached)?;
    if args.record {
        let path = Path::new(REFERENCES).join(format!("{name}.json"));
        std::fs::create_dir_all(REFERENCES)?;
        reached.write(&path)?;
        talk!("recorded {}", path.display());
    }
    match reached.failed() {
        0 => Ok(()),
        failed => Err(Failure::Run(format!(
            "{failed} of {} runs failed, and {RESULT} tells why; the same command tries them again",
            planned.runs.len()
        ))),
    }
}

/// Prints what was reached: the table of the paper, or all numbers for programs.
fn print_result(reached: &SuiteResult) -> Result<(), Failure> {
    match wants_json() {
        true => put!("{:#}", json!(reached)),
        false => put!("{}", reached.table().trim_end()),
    }
}

fn overrides(args: &SuiteArgs) -> Vec<String> {
    let device = args.device.iter().map(|device| format!("training.device={device}"));
    args.overrides.iter().cloned().chain(device).collect()
}

/// Runs what has not finished yet, and writes what was reached.
fn run(asked: &Asked<'_>, planned: &SuitePlan, out: &Path, jobs: &JobsArgs) -> Result<SuiteResult, Failure> {
    let _lock = RunLock::acquire(out)?;
    let signals = signals::listen(false)?;
    let _busy = signals.busy();
    let names = planned.points.iter().map(|planned| planned.point.name()).collect();
    let mut progress = Progress::new(planned.runs.iter().collect(), names);
    let ended = runs::run_all(planned.runs.iter().collect(), (&jobs.share(), &signals.requests), &mut progress);
    drop(progress);
    let ends = ended.inspect_err(|failure| {
        if matches!(failure, Failure::Interrupted(_)) {
            talk!("\nstopped; every run has saved, and the same command goes on from there");
        }
    })?;
    let reached = gather(asked, &planned.points, &ends)?;
    reached.publish(out)?;
    Ok(reached)
}

/// Prints every suite with what it asks.
fn list() -> Result<(), Failure> {
    if wants_json() {
        let runs = |suite: &Suite| suite.questions.is_none().then(|| (suite.points)().len());
        let told = |suite: &Suite| json!({ "suite": suite.name, "about": suite.about, "runs": runs(suite) });
        return put!("{:#}", SUITES.iter().map(told).collect::<Value>());
    }
    for suite in &SUITES {
        let runs = match suite.questions {
            Some(_) => "asks".to_owned(),
            None => format!("{} runs", (suite.points)().len()),
        };
        put!("{:<28} {runs:>8}  {}", suite.name, suite.about)?;
    }
    Ok(())
}

/// Prints what would run.
fn show(suite: &Suite, planned: &SuitePlan) -> Result<(), Failure> {
    if wants_json() {
        let mut points = Vec::new();
        for (PlannedPoint { point, totals, .. }, run) in planned.points.iter().zip(&planned.runs) {
            let finished = runs::finished(run)?.is_some();
            points.push(json!({ "point": point.name(), "costs": totals, "steps": run.steps, "finished": finished }));
        }
        let (name, differs) = (suite.name, suite.differs);
        return put!("{:#}", json!({ "suite": name, "paper": suite.paper, "differs": differs, "points": points }));
    }
    put!("{}: {}\n{}", suite.name, suite.about, suite.paper)?;
    for words in suite.differs {
        put!("differs: {words}")?;
    }
    put!("\n{:<72} {:>12} {:>10} {:>9}", "point", "parameters", "steps", "finished")?;
    for (PlannedPoint { point, totals, .. }, run) in planned.points.iter().zip(&planned.runs) {
        let finished = if runs::finished(run)?.is_some() { "yes" } else { "" };
        put!("{:<72} {:>12} {:>10} {finished:>9}", point.name(), thousands(totals.parameters), thousands(run.steps))?;
    }
    put!("\n{} runs", planned.runs.len())
}

/// Runs the fastest stored point of every reference again.
fn check(args: &SuiteArgs) -> Result<(), Failure> {
    let all = references()?;
    let wanted = |result: &SuiteResult| args.suite.as_ref().is_none_or(|name| *name == result.suite);
    let all: Vec<(PathBuf, SuiteResult)> = all.into_iter().filter(|(_, result)| wanted(result)).collect();
    if all.is_empty() {
        let name = args.suite.as_deref().unwrap_or("any suite");
        let problem = format!("no reference of {name} is stored in {}", references_folder().display());
        return Err(Failure::Run(format!("{problem}\n  hint: --record stores one")));
    }
    let (mut wrong, mut told) = (Vec::new(), Vec::new());
    for (path, stored) in &all {
        let (holds, words) = match check_one(stored, args) {
            Ok(words) => (true, words),
            Err(Failure::Run(problem)) => {
                wrong.push(path.display().to_string());
                (false, format!("WRONG: {problem}"))
            }
            Err(other) => return Err(other),
        };
        match wants_json() {
            true => told.push(json!({ "suite": stored.suite, "holds": holds, "words": words })),
            false => put!("{:<28} {words}", stored.suite)?,
        }
    }
    if wants_json() {
        put!("{:#}", json!(told))?;
    }
    let failure = || format!("{} of {} references do not hold: {}", wrong.len(), all.len(), wrong.join(", "));
    if wrong.is_empty() { Ok(()) } else { Err(Failure::Run(failure())) }
}

/// Runs the fastest point of a reference again; says how it compares.
fn check_one(stored: &SuiteResult, args: &SuiteArgs) -> Result<String, Failure> {
    let suite = Suite::find(&stored.suite)?;
    let cells = stored.rows.iter().flat_map(|row| row.cells.iter().map(move |cell| (row, cell)));
    let fastest = cells.min_by(|a, b| a.1.seconds.total_cmp(&b.1.seconds));
    let (row, cell) = fastest.ok_or_else(|| Failure::Run("no point of it has finished".into()))?;
    let overrides = overrides(args);
    let asked = Asked { suite, model: None, overrides: &overrides, only: &[], seed: stored.seed };
    let out = args.out.clone().unwrap_or_else(|| "checkpoints/suite/check".into()).join(suite.name);
    let planned = plan(&asked, &out, caller())?;
    let mut pairs = planned.points.into_iter().zip(planned.runs);
    let alone = pairs.find(|(planned, _)| is_point(planned, row, cell));
    let alone = alone.map(|(point, run)| SuitePlan { points: vec![point], runs: vec![run] });
    let gone = || Failure::Run(format!("{}, {} is no point of the suite any more", row.task, cell.cell));
    let alone = alone.ok_or_else(gone)?;
    let point = &alone.points[0];
    let name = point.point.name();
    for (what, found, stored) in [
        ("its recipe has", result::id(&point.point.recipe, None), &cell.recipe),
        ("its rows have", data_hash(point)?, &cell.data),
    ] {
        if found != *stored {
            return Err(Failure::Run(format!("{name}: {what} the hash {found}, stored is {stored}")));
        }
    }
    let reached = run(&asked, &alone, &out, &args.jobs)?;
    let [SuiteRow { score: Some(now), .. }] = reached.rows[..] else {
        let problem = reached.rows.iter().flat_map(|row| &row.failed).next();
        return Err(Failure::Run(problem.cloned().unwrap_or_default()));
    };
    let before = cell.score;
    let words = format!("{name}: {:.1} %, stored {:.1} %", 100.0 * now, 100.0 * before);
    match (now - before).abs() <= TOLERANCE {
        true => Ok(words),
        false => Err(Failure::Run(format!("{words}; {:.0} points apart are allowed", 100.0 * TOLERANCE))),
    }
}

fn is_point(planned: &PlannedPoint, row: &SuiteRow, cell: &SuiteCell) -> bool {
    let point = &planned.point;
    (&point.task, &point.setting, &point.size, &point.cell) == (&row.task, &row.setting, &row.size, &cell.cell)
}

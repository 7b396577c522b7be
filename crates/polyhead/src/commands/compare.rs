//! `polyhead compare`: is one mechanism better than another at the same budget, and by more than chance?

pub(super) mod progress;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use polyhead_training::run_folder::{RunLock, atomic_write};

use clap::{Args, Parser};
use polyhead_experiments::calibration::Paces;
use polyhead_experiments::comparison::{self, Read};
use polyhead_experiments::launcher::Launcher;
use polyhead_experiments::outcome::{self, Outcome};
use polyhead_experiments::plan::{self, Plan, Run};
use polyhead_experiments::prepare::Prepared;
use polyhead_experiments::processes::Share;
use polyhead_experiments::runs;
use polyhead_experiments::{evaluate, html, json as numbers, markdown, record};
use polyhead_runs::Resolved;
use polyhead_runs::kind::{ForAnyKind, Kind, for_kind};
use polyhead_runs::probe::probe;
use polyhead_runs::text::quoted;
use serde_json::json;

use super::train::summary::program;
use crate::allowed::caller;
use crate::cli::{Cli, JobsArgs};
use crate::console::{clock, put, reading, say, talk, thousands, wants_json};
use crate::signals;
use polyhead_recipe::Recipe;
use polyhead_runs::Failure;
use polyhead_runs::costs::tokens_per_step;

/// How to compare.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// The comparison, a TOML file with [[arm]] tables.
    pub comparison: PathBuf,
    /// How runs are started.
    #[command(flatten)]
    pub jobs: JobsArgs,
    /// Where runs and report are written. Default: checkpoints/compare/<name of the comparison>.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Show the plan: arms with their costs, and the time by a few steps of each. Nothing is written.
    #[arg(long)]
    pub dry_run: bool,
    /// With --dry-run: only compute, do not train.
    #[arg(long, requires = "dry_run")]
    pub no_probe: bool,
    /// Write the numbers to recipes/results too, for the replication table.
    #[arg(long, conflicts_with = "dry_run")]
    pub record: bool,
    /// The same as training.device=... in the base recipe.
    #[arg(long, value_parser = crate::cli::device())]
    pub device: Option<String>,
}

/// Runs a comparison and writes its report.
///
/// # Errors
/// If an arm cannot run, before anything is run; if runs failed, after the report was written.
pub fn compare(args: &CompareArgs) -> Result<(), Failure> {
    let out = args.out.clone().unwrap_or_else(|| default_folder(&args.comparison));
    let mut known = BTreeMap::new();
    let mut read = comparison::read(&args.comparison, check_task)?;
    let device: Vec<String> = args.device.iter().map(|device| format!("training.device={device}")).collect();
    read.base.extend(polyhead_recipe::override_layers(&device)?);
    read.warnings.iter().for_each(|warning| talk!("warning: {warning}"));
    let places = (args.comparison.as_path(), out.as_path());
    let mut prepared = Prepared::plan(&read, places)?;
    let share = args.jobs.share();
    prepared.paces = Paces::read(&out, &share)?;
    let mut plan = |read: &Read, prepared: &Prepared| {
        plan::plan(read.clone(), prepared, places, &mut |recipe| text_hash(recipe, &mut known), caller())
    };
    // What is wrong is told before anything is written, as far as it can be known then.
    let planned = match prepared.counts() {
        (_, 0) => Some(plan(&read, &prepared)?),
        _ => None,
    };
    if args.dry_run {
        return match &planned {
            Some(plan) => show(plan, &share, !args.no_probe),
            None => show_preparations(&prepared),
        };
    }
    let again = again(places, &share, args.device.as_deref());
    let interrupted = |failure: &Failure| {
        if matches!(failure, Failure::Interrupted(_)) {
            talk!("\nstopped; every run has saved. This goes on from there:\n  {again}");
        }
    };
    let _lock = RunLock::acquire(&out)?;
    let signals = signals::listen(false)?;
    let _busy = signals.busy();
    let requests = &*signals.requests;
    prepared.make(&share, requests, say).inspect_err(interrupted)?;
    let mut planned = planned.map_or_else(|| plan(&read, &prepared), Ok)?;
    if !planned.timings.is_empty() {
        let (timings, tolerance) = (&planned.timings[..], planned.comparison.tolerance());
        let paces = prepared.paces.measure((timings, tolerance), &out, (&share, requests), say);
        prepared.paces = paces.inspect_err(interrupted)?;
        planned = plan(&read, &prepared)?;
    }
    let plan = planned;
    told_matches(&plan);
    let run = |picked: &[usize]| {
        let mut progress = progress::Progress::of_plan(&plan, picked);
        let picked = picked.iter().map(|&at| &plan.runs[at]).collect();
        runs::run_all(picked, (&share, requests), &mut progress).inspect_err(interrupted)
    };
    let choosing = plan.choosing();
    let mut ends = BTreeMap::new();
    if !choosing.is_empty() {
        ends.extend(choosing.iter().copied().zip(run(&choosing)?));
    }
    let chosen = outcome::choose(&plan, &ends)?;
    let mut reported = plan.reported(&chosen);
    reported.retain(|at| !ends.contains_key(at));
    if !reported.is_empty() {
        tell_choices(&plan, &chosen);
        ends.extend(reported.iter().copied().zip(run(&reported)?));
    }
    let mut outcome = Outcome::gather(&plan, &chosen, &ends, (prepared.commands(), &again), say)?;
    evaluate::evaluate(&mut outcome, &share, requests, say).inspect_err(interrupted)?;
    atomic_write(&out.join("report.md"), markdown::report(&outcome).as_bytes())?;
    atomic_write(&out.join("report.html"), html::report(&outcome)?.as_bytes())?;
    let told = numbers::report(&outcome);
    atomic_write(&out.join("report.json"), format!("{told:#}\n").as_bytes())?;
    if wants_json() {
        put!("{told:#}")?;
    }
    talk!("\n{}", outcome.finding());
    outcome.warnings().iter().for_each(|warning| talk!("warning: {warning}"));
    talk!("\nreport   {0}/report.html, {0}/report.md and {0}/report.json", out.display());
    if args.record {
        talk!("recorded {}", record::write(&outcome, say)?.display());
    }
    match outcome.failed() {
        0 => Ok(()),
        failed => Err(Failure::Run(format!(
            "{failed} of {} runs failed, and the report tells which; the same command tries them again",
            plan.count()
        ))),
    }
}

/// Checks a comparison as `compare` would, without running anything.
///
/// # Errors
/// If an arm cannot run.
pub fn validate(path: &Path) -> Result<(), Failure> {
    let read = comparison::read(path, check_task)?;
    let out = default_folder(path);
    let prepared = Prepared::plan(&read, (path, &out))?;
    if plan::waits_for_files(&read, &prepared) {
        return Ok(());
    }
    plan::plan(read, &prepared, (path, &out), &mut |_| Ok(None), caller()).map(|_| ())
}

/// A hash of the text that a recipe learns from; each text is read once.
fn text_hash(run: &Resolved, known: &mut BTreeMap<String, Option<String>>) -> Result<Option<String>, Failure> {
    let Recipe { data, tokenizer, training, .. } = &run.recipe;
    if data.is_generated() && data.source().paths().is_empty() {
        return Ok(None);
    }
    let key = format!("{data:?} {tokenizer:?} {}", training.seq_len);
    if let Some(hash) = known.get(&key) {
        return Ok(hash.clone());
    }
    let hash = run.text_hash()?;
    known.insert(key, hash.clone());
    Ok(hash)
}

/// What a whole run would take, by a few steps of it.
fn time_of(run: &Resolved) -> Result<Duration, Failure> {
    struct Measure<'a>(&'a Resolved);
    impl ForAnyKind for Measure<'_> {
        type Output = Result<Duration, Failure>;

        fn run<K: Kind>(self) -> Self::Output {
            let data = K::open(self.0, &mut reading)?;
            Ok(probe::<K>(self.0, &data)?.whole(&self.0.recipe))
        }
    }
    for_kind(&run.recipe.model, Measure(run))
}

/// What is wrong with flags of `polyhead eval`, in a line.
pub(super) fn check_task(flags: &str) -> Result<(), String> {
    let words = ["polyhead", "eval", "run"].into_iter().chain(flags.split_whitespace());
    match Cli::try_parse_from(words) {
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string().lines().next().unwrap_or_default().replace("error: ", "")),
    }
}

fn default_folder(comparison: &Path) -> PathBuf {
    Path::new("checkpoints/compare").join(comparison.file_stem().unwrap_or("comparison".as_ref()))
}

/// The command that runs a comparison again.
fn again((file, out): (&Path, &Path), share: &Share, device: Option<&str>) -> String {
    let mut words = vec![program(), "compare".into(), quoted(&file.display().to_string())];
    words.push(format!("--jobs {}", share.jobs));
    words.extend(share.launcher.as_ref().map(Launcher::flag));
    if out != default_folder(file) {
        words.push(format!("--out {}", quoted(&out.display().to_string())));
    }
    words.extend(device.map(|device| format!("--device {device}")));
    words.extend(share.flags.iter().cloned());
    words.join(" ")
}

/// Says which setting each arm is reported with.
fn tell_choices(plan: &Plan, chosen: &[usize]) {
    for (arm, &at) in plan.arms.iter().zip(chosen).filter(|_| plan.comparison.tune.is_some()) {
        talk!("chosen   {}: {}", arm.name, arm.choices[at].words);
    }
}

fn told_matches(plan: &Plan) {
    let mut told = BTreeSet::new();
    for (arm, choice) in plan.arms.iter().flat_map(|arm| arm.choices.iter().map(move |choice| (arm, choice))) {
        let Some(found) = &choice.matched else { continue };
        let (what, deviation) = (plan.comparison.matched.words(), 100.0 * found.deviation());
        let line = format!(
            "match    {}: {} = {} gives {} {what}, the target is {} ({deviation:+.2} %)",
            arm.name,
            found.key,
            found.value,
            thousands(found.found),
            thousands(found.target)
        );
        // Once for all values of a sweep that change nothing about it.
        if told.insert(line.clone()) {
            talk!("{line}");
        }
    }
}

/// Prints what would be made before the arms, of which nothing can be told before that.
fn show_preparations(prepared: &Prepared) -> Result<(), Failure> {
    let (all, waiting) = prepared.counts();
    if wants_json() {
        return put!(
            "{:#}",
            json!({ "prepare": { "models": all, "waiting": waiting, "commands": prepared.commands() } })
        );
    }
    put!("prepare    {all} preparations, {} of them finished; for the first seed:", all - waiting)?;
    for command in prepared.commands() {
        put!("           {command}")?;
    }
    put!("arms       start from these, and can be counted once they are there")
}

/// Prints what would run, for programs: every arm with every setting.
fn show_as_json(plan: &Plan, share: &Share, measure: bool) -> Result<(), Failure> {
    let mut arms = Vec::new();
    for (arm, choice) in plan.arms.iter().flat_map(|arm| arm.choices.iter().map(move |choice| (arm, choice))) {
        let seconds = if measure { Some(time_of(&choice.run)?.as_secs_f64()) } else { None };
        arms.push(json!({
            "arm": arm.name, "setting": choice.words, "costs": choice.totals, "seconds_per_run": seconds,
            "deviation": choice.matched.as_ref().map(|found| found.deviation()),
        }));
    }
    let finished = plan.runs.iter().map(|run| Ok(u64::from(runs::finished(run)?.is_some())));
    let finished: u64 = finished.sum::<Result<u64, Failure>>()?;
    put!(
        "{:#}",
        json!({ "arms": arms, "seeds": plan.comparison.seeds, "runs": plan.count(), "finished": finished, "jobs": share.jobs,
            "threads": share.threads, "folder": plan.out })
    )
}

/// Prints what would run.
fn show(plan: &Plan, share: &Share, measure: bool) -> Result<(), Failure> {
    if wants_json() {
        return show_as_json(plan, share, measure);
    }
    // Trials change how a model is trained, as a rule not what it costs: one of them stands for all.
    let tuned = plan.comparison.tune.as_ref();
    let shown = |arm: &'_ plan::ArmPlan| if tuned.is_some() { 1 } else { arm.choices.len() };
    let named = |arm: &plan::ArmPlan, choice: &plan::Choice| match choice.words.is_empty() || tuned.is_some() {
        true => arm.name.clone(),
        false => format!("{}, {}", arm.name, choice.words),
    };
    let rows = || plan.arms.iter().flat_map(|arm| arm.choices[..shown(arm)].iter().map(move |choice| (arm, choice)));
    let width = rows().map(|(arm, choice)| named(arm, choice).chars().count()).max().unwrap_or(0).max(28);
    let line = |name: &str, cells: [&str; 5]| {
        let [a, b, c, d, e] = cells;
        put!("{name:<width$} {a:>12} {b:>10} {c:>14} {d:>14} {e:>12}")
    };
    let first = &plan.arms[plan.comparison.base_of(0)].choices[0].run;
    let unit = first.known()?.unit();
    line("arm", ["parameters", "off", &format!("FLOPs/{unit}"), &format!("KV B/{unit}"), "one run"])?;
    let runs_of_row = plan.count() as u32 / rows().count().max(1) as u32;
    let mut whole = Duration::ZERO;
    for (arm, choice) in rows() {
        let deviation = choice.matched.as_ref().map(|found| format!("{:+.2} %", 100.0 * found.deviation()));
        let time = if measure { Some(time_of(&choice.run)?) } else { None };
        whole += time.unwrap_or_default() * runs_of_row;
        line(
            &named(arm, choice),
            [
                &thousands(choice.totals.parameters),
                &deviation.unwrap_or_default(),
                &thousands(choice.totals.flops_per_token),
                &thousands(choice.totals.cached_bytes_per_token),
                &time.map(clock).unwrap_or_default(),
            ],
        )?;
    }
    put!("")?;
    told_matches(plan);
    if !plan.timings.is_empty() {
        put!(
            "steps      of the arms are set once they have been timed, so that all take equally long; here they are the base arm's"
        )?;
    }
    let (runs, seeds, arms) = (plan.count(), plan.comparison.seeds.len(), plan.arms.len());
    if let Some(tune) = tuned {
        let seeds = plan.comparison.trial_seeds().len();
        put!("trials     {} for each arm, {seeds} {}:", tune.trials, if seeds == 1 { "seed" } else { "seeds" })?;
        for choice in &plan.arms[0].choices {
            put!("           {}", choice.words)?;
        }
    }
    let trials = tuned.map(|_| format!("{} trials first; ", plan.choosing().len())).unwrap_or_default();
    put!("runs       {runs}: {trials}{arms} arms, {seeds} seeds; {} at a time, {}", share.jobs, share.words())?;
    let tokens = |run: &Run| {
        let per_step = tokens_per_step(&plan.arms[run.arm].choices[run.choice].run.recipe);
        per_step.saturating_mul(run.steps)
    };
    let of_runs: Vec<u64> = plan.all().into_iter().map(|at| tokens(&plan.runs[at])).collect();
    let [least, most] = [of_runs.iter().min(), of_runs.iter().max()].map(|tokens| thousands(*tokens.unwrap_or(&0)));
    let each = if least == most { least } else { format!("{least} to {most}") };
    put!("{:<10} {each} a run, {} in all", format!("{unit}s"), thousands(of_runs.iter().sum()))?;
    put!("folder     {}", plan.out.display())?;
    let mut finished = 0;
    for run in &plan.runs {
        finished += usize::from(runs::finished(run)?.is_some());
    }
    put!("finished   {finished} of {runs}")?;
    if measure {
        put!("time       about {} for all runs together, by a few steps of each arm with all cores", clock(whole))?;
    }
    Ok(())
}

//! `polyhead compare`: is one mechanism better than another at the same budget, and by more than chance?
//!
//! In order: the file says what is compared (`comparison.rs`), every arm gets a recipe of the same cost (`matching.rs`,
//! `plan.rs`), every run is a process of its own (`runs.rs`, `progress.rs`), what they reached is put together
//! (`outcome.rs`, `statistics.rs`) and written for people (`markdown.rs`, `html.rs`, `figures.rs`) and for the
//! replication table (`record.rs`).

pub mod comparison;
mod figures;
mod html;
mod markdown;
mod matching;
mod outcome;
mod plan;
mod progress;
pub mod record;
mod runs;
pub mod statistics;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use polyhead_training::run_folder::{RunLock, atomic_write};

use crate::assemble::Resolved;
use crate::cli::CompareArgs;
use crate::commands::{probe, program, quoted};
use crate::console::{clock, put, talk, thousands};
use crate::costs::Costs;
use crate::recipe::Recipe;
use crate::report::Failure;
use crate::signals;

use outcome::Outcome;
use plan::Plan;
use runs::Share;

/// Runs a comparison and writes its report.
///
/// # Errors
/// If an arm cannot run, before anything is run; if runs failed, after the report was written.
pub fn compare(args: &CompareArgs) -> Result<(), Failure> {
    let out = args.out.clone().unwrap_or_else(|| default_folder(&args.comparison));
    let mut known = BTreeMap::new();
    let read = comparison::read(&args.comparison)?;
    let plan = plan::plan(read, (&args.comparison, &out), &mut |recipe| text_hash(recipe, &mut known))?;
    let share = Share::of(args.jobs as usize);
    if args.dry_run {
        return show(&plan, share, !args.no_probe);
    }
    told_matches(&plan);
    let _lock = RunLock::acquire(&out)?;
    let stop = signals::listen(false)?;
    let mut progress = progress::Progress::new(&plan);
    let ended = runs::run_all(&plan, share, &stop, &mut progress);
    drop(progress);
    let ends = ended.inspect_err(|failure| {
        if matches!(failure, Failure::Interrupted(_)) {
            talk!("\nstopped; every run has saved. This goes on from there:\n  {}", again(&plan, share));
        }
    })?;
    let outcome = Outcome::gather(&plan, ends, &again(&plan, share))?;
    atomic_write(&out.join("report.md"), markdown::report(&outcome).as_bytes())?;
    atomic_write(&out.join("report.html"), html::report(&outcome)?.as_bytes())?;
    talk!("\n{}", outcome.finding());
    talk!("\nreport   {0}/report.html and {0}/report.md", out.display());
    if args.record {
        talk!("recorded {}", record::write(&outcome)?.display());
    }
    match outcome.failed() {
        0 => Ok(()),
        failed => Err(Failure::Run(format!(
            "{failed} of {} runs failed, and the report tells which; the same command tries them again",
            plan.runs.len()
        ))),
    }
}

/// Checks a comparison as `compare` would, without running anything.
///
/// # Errors
/// If an arm cannot run.
pub fn validate(path: &Path) -> Result<(), Failure> {
    let read = comparison::read(path)?;
    if plan::waits_for_weights(&read) {
        return Ok(());
    }
    plan::plan(read, (path, &default_folder(path)), &mut |_| Ok(None)).map(|_| ())
}

/// A hash of the text that a recipe learns from; each text is read once.
fn text_hash(run: &Resolved, known: &mut BTreeMap<String, Option<String>>) -> Result<Option<String>, Failure> {
    let Recipe { data, tokenizer, training, .. } = &run.recipe;
    if !data.is_text() {
        return Ok(None);
    }
    let key = format!("{data:?} {tokenizer:?} {}", training.seq_len);
    if let Some(hash) = known.get(&key) {
        return Ok(hash.clone());
    }
    let hash = run.data(&mut |_, _| {})?.text_hash;
    known.insert(key, hash.clone());
    Ok(hash)
}

fn default_folder(comparison: &Path) -> PathBuf {
    Path::new("checkpoints/compare").join(comparison.file_stem().unwrap_or("comparison".as_ref()))
}

/// The command that runs a comparison again.
fn again(plan: &Plan, share: Share) -> String {
    let mut words = vec![program(), "compare".into(), quoted(&plan.file.display().to_string())];
    words.push(format!("--jobs {}", share.jobs));
    if plan.out != default_folder(&plan.file) {
        words.push(format!("--out {}", quoted(&plan.out.display().to_string())));
    }
    words.join(" ")
}

fn told_matches(plan: &Plan) {
    for arm in &plan.arms {
        for choice in &arm.choices {
            if let Some(found) = &choice.matched {
                let (what, deviation) = (plan.comparison.matched.words(), 100.0 * found.deviation());
                talk!(
                    "match    {}: {} = {} gives {} {what}, the target is {} ({deviation:+.2} %)",
                    arm.name,
                    found.key,
                    found.value,
                    thousands(found.found),
                    thousands(found.target)
                );
            }
        }
    }
}

/// Prints what would run.
fn show(plan: &Plan, share: Share, measure: bool) -> Result<(), Failure> {
    let line = |name: &str, cells: [&str; 5]| {
        let [a, b, c, d, e] = cells;
        put!("{name:<28} {a:>12} {b:>10} {c:>14} {d:>14} {e:>12}")
    };
    line("arm", ["parameters", "off", "FLOPs/token", "KV B/token", "one run"])?;
    let mut whole = Duration::ZERO;
    for arm in &plan.arms {
        for choice in &arm.choices {
            let deviation = choice.matched.as_ref().map(|found| format!("{:+.2} %", 100.0 * found.deviation()));
            let time = match measure {
                true => Some(probe(&choice.run, choice.run.data(&mut |_, _| {})?)?.whole(&choice.run.recipe)),
                false => None,
            };
            whole += time.unwrap_or_default() * plan.comparison.seeds.len() as u32;
            let name =
                if choice.words.is_empty() { arm.name.clone() } else { format!("{}, {}", arm.name, choice.words) };
            line(
                &name,
                [
                    &thousands(choice.totals.parameters),
                    &deviation.unwrap_or_default(),
                    &thousands(choice.totals.flops_per_token),
                    &thousands(choice.totals.cached_bytes_per_token),
                    &time.map(clock).unwrap_or_default(),
                ],
            )?;
        }
    }
    put!("")?;
    told_matches(plan);
    let first = &plan.arms[plan.base].choices[0].run;
    let tokens = Costs::of(&first.recipe, &first.decoder, first.vocab_size()).tokens;
    let Share { jobs, threads } = share;
    let (runs, seeds) = (plan.runs.len(), plan.comparison.seeds.len());
    put!("runs       {runs}: {} arms, {seeds} seeds; {jobs} at a time, {threads} threads each", plan.arms.len())?;
    put!("tokens     {} a run, {} in all", thousands(tokens), thousands(tokens * runs as u64))?;
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

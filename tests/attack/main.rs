//! Attacks the binary: kills, damaged and hostile files, mutated recipes, full disks, signals. See README.md beside this file.
//!
//! ```sh
//! cargo test -p polyhead --test attack -- --minutes 10
//! ```

mod case;
mod checkpoints;
mod disks;
mod events;
mod files;
mod kills;
mod mutate;
mod random;
mod readers;
mod recipes;
mod runs;
mod signals;
mod specimens;
mod threads;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;

use case::{Case, Held, Tried};
use random::Random;

/// Attacks the binary for minutes and tells what did not hold.
#[derive(Debug, Parser)]
struct Args {
    /// Time for all kinds together, which get equal shares of it.
    #[arg(long, default_value_t = 5.0)]
    minutes: f64,
    /// Decides every case. The same seed tries the same.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Kinds to try. Default: all.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only this case of each kind, as a failure names it.
    #[arg(long)]
    case: Option<u64>,
    /// The binary under attack. Default: the one that Cargo has just built.
    #[arg(long, default_value = env!("CARGO_BIN_EXE_polyhead"))]
    binary: PathBuf,
    /// Where the folders of failed cases are left.
    #[arg(long, default_value = "target/attack")]
    failures: PathBuf,
}

/// A way to attack: cases of it are drawn until the time is over.
trait Kind {
    /// As `--only` names it.
    fn name(&self) -> &'static str;
    /// Makes what all cases need, in a folder of its own.
    fn prepare(&mut self, case: &mut Case) -> Held;
    /// Tries one case, in an empty folder.
    fn attack(&mut self, case: &mut Case) -> Held<Tried>;
}

/// What came of a kind.
struct Tally {
    name: &'static str,
    held: u64,
    failed: Vec<String>,
    /// Cases that could not be tried, by the reason.
    skipped: Vec<(String, u64)>,
    seconds: f64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let mut kinds: Vec<Box<dyn Kind>> = vec![
        Box::new(recipes::Recipes::default()),
        Box::new(files::Files::default()),
        Box::new(checkpoints::Checkpoints::default()),
        Box::new(kills::Kills::default()),
        Box::new(readers::Readers::default()),
        Box::new(disks::Disks::default()),
        Box::new(threads::Threads::default()),
        Box::new(signals::Signals::default()),
    ];
    let known: Vec<&str> = kinds.iter().map(|kind| kind.name()).collect();
    if let Some(unknown) = args.only.iter().find(|name| !known.contains(&name.as_str())) {
        eprintln!("error: --only {unknown}: the kinds are {}", known.join(", "));
        return ExitCode::from(2);
    }
    kinds.retain(|kind| args.only.is_empty() || args.only.iter().any(|name| name == kind.name()));
    let share = Duration::from_secs_f64(args.minutes.max(0.0) * 60.0 / kinds.len() as f64);
    let mut tallies = Vec::new();
    for kind in &mut kinds {
        match attack(kind.as_mut(), &args, share) {
            Ok(tally) => tallies.push(tally),
            Err(problem) => {
                eprintln!("error: {problem}");
                return ExitCode::from(2);
            }
        }
    }
    summary(&tallies);
    ExitCode::from(u8::from(tallies.iter().any(|tally| !tally.failed.is_empty())))
}

/// Draws cases of one kind until its time is over, one at least.
fn attack(kind: &mut dyn Kind, args: &Args, share: Duration) -> std::io::Result<Tally> {
    let name = kind.name();
    let binary = std::fs::canonicalize(&args.binary)?;
    let scratch = tempfile::Builder::new().prefix(&format!("attack-{name}-")).tempdir()?;
    let mut tally = Tally { name, held: 0, failed: Vec::new(), skipped: Vec::new(), seconds: 0.0 };
    let mut prepared = Case::new(&scratch.path().join("prepared"), &binary, Random::new(args.seed, name, u64::MAX))?;
    if let Err(broken) = kind.prepare(&mut prepared) {
        tally.failed.push(format!("{name}: cannot be prepared: {broken}"));
        return Ok(tally);
    }
    let (started, mut told) = (Instant::now(), Instant::now());
    let mut number = args.case.unwrap_or(0);
    loop {
        let folder = scratch.path().join(format!("case-{number}"));
        let mut case = Case::new(&folder, &binary, Random::new(args.seed, name, number))?;
        match kind.attack(&mut case) {
            Ok(Tried::Held) => tally.held += 1,
            Ok(Tried::Skipped(why)) => match tally.skipped.iter_mut().find(|(reason, _)| *reason == why) {
                Some((_, count)) => *count += 1,
                None => tally.skipped.push((why, 1)),
            },
            Err(broken) => {
                let kept = keep(&case, &args.failures.join(format!("{name}-{}-{number}", args.seed)), &broken.0)?;
                let again = format!("--seed {} --only {name} --case {number}", args.seed);
                eprintln!("FAILED {name} {number}: {broken}\n  again: {again}\n  left in {kept}");
                tally.failed.push(format!("{again}  ({kept}): {}", broken.0.lines().next().unwrap_or_default()));
            }
        }
        std::fs::remove_dir_all(&folder)?;
        if told.elapsed() > Duration::from_secs(10) {
            told = Instant::now();
            let (held, failed) = (tally.held, tally.failed.len());
            eprintln!("{name}: {held} held, {failed} failed, {:.0} s", started.elapsed().as_secs_f64());
        }
        number += 1;
        if args.case.is_some() || started.elapsed() >= share {
            break;
        }
    }
    tally.seconds = started.elapsed().as_secs_f64();
    Ok(tally)
}

/// Moves the folder of a failed case to where it can be looked at, with the commands that were run and what was wrong.
fn keep(case: &Case, to: &Path, broken: &str) -> std::io::Result<String> {
    if to.exists() {
        std::fs::remove_dir_all(to)?;
    }
    runs::copy_folder(&case.dir, to)?;
    std::fs::write(to.join("run.sh"), case.script())?;
    std::fs::write(to.join("broken.txt"), broken)?;
    Ok(to.display().to_string())
}

fn summary(tallies: &[Tally]) {
    println!("{:<12} {:>7} {:>7} {:>7} {:>8} {:>8}", "kind", "tried", "held", "failed", "skipped", "seconds");
    for Tally { name, held, failed, skipped, seconds } in tallies {
        let (failures, skips) = (failed.len() as u64, skipped.iter().map(|(_, count)| count).sum::<u64>());
        println!("{name:<12} {:>7} {held:>7} {failures:>7} {skips:>8} {seconds:>8.0}", held + failures);
    }
    for Tally { name, skipped, .. } in tallies {
        skipped.iter().for_each(|(why, count)| println!("skipped: {name}: {why} ({count})"));
    }
    tallies.iter().flat_map(|tally| &tally.failed).for_each(|failure| println!("failed: {failure}"));
}

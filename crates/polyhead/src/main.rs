//! `polyhead`: recipes and the command line.

mod allocator;
mod allowed;
mod cli;
mod commands;
mod console;
mod cut_files;
#[cfg(feature = "tui")]
mod dashboard;
mod gpu_memory;
mod head_report;
mod heads;
mod hub;
mod inspect;
mod probe;
mod profile;
mod ranks;
mod serve;
mod signals;

use std::process::ExitCode;

use clap::Parser;
use polyhead_models::weights::NonFinite;
use polyhead_runs::Failure;

use allowed::Allowed;

fn main() -> ExitCode {
    allocator::keep_large_buffers();
    signals::outlive_file_limit();
    cut_files::name_them();
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version are our own words; a mistake repeats what was typed.
        Err(told) if !told.use_stderr() => told.exit(),
        Err(mistake) => {
            console::complain(mistake.render().to_string().trim_end());
            return ExitCode::from(2);
        }
    };
    console::decide(cli.quiet, cli.json);
    allowed::decide(Allowed {
        nonfinite: if cli.allow_nonfinite { NonFinite::Allow } else { NonFinite::Refuse },
        too_little_memory: cli.ignore_memory,
        download: cli.download,
        // Once, for as long as the process lives.
        base: cli.base.map(|base| &*Box::leak(base.into_boxed_path())),
    });
    let arguments: Vec<String> = std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect();
    cli::renamed_flags(&arguments).iter().for_each(|warning| console::say(warning));
    match gpu_memory::caught(|| commands::run(cli.command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Unread) => ExitCode::SUCCESS,
        Err(failure) => {
            console::complain(&failure.to_string());
            ExitCode::from(code(&failure))
        }
    }
}

/// 2: the recipe or the command line is wrong; 1: the run failed; 128 + signal: a signal ended it.
fn code(failure: &Failure) -> u8 {
    match failure {
        Failure::Usage(_) => 2,
        Failure::Run(_) => 1,
        Failure::Unread => 0,
        Failure::Interrupted(signal) => 128 + *signal as u8,
    }
}

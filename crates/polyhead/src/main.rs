//! `polyhead`: recipes and the command line.

mod allocator;
mod allowed;
mod assemble;
mod classifier;
mod cli;
mod commands;
mod compare;
mod console;
mod costs;
mod cut_files;
#[cfg(feature = "tui")]
mod dashboard;
mod device;
mod embedder;
mod inspect;
mod layers;
mod page;
mod pretrained;
mod recipe;
mod report;
mod result;
mod schema;
mod signals;
mod stages;

use std::process::ExitCode;

use clap::Parser;
use polyhead_models::weights::NonFinite;

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
            console::say(mistake.render().to_string().trim_end());
            return ExitCode::from(2);
        }
    };
    allowed::decide(Allowed {
        nonfinite: if cli.allow_nonfinite { NonFinite::Allow } else { NonFinite::Refuse },
        too_little_memory: cli.ignore_memory,
    });
    match commands::run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(report::Failure::Unread) => ExitCode::SUCCESS,
        Err(failure) => {
            console::talk!("{failure}");
            ExitCode::from(failure.code())
        }
    }
}

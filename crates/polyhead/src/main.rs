//! `polyhead`: recipes and the command line.

mod allocator;
mod assemble;
mod classifier;
mod cli;
mod commands;
mod compare;
mod console;
mod costs;
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

fn main() -> ExitCode {
    allocator::keep_large_buffers();
    let cli = cli::Cli::parse();
    match commands::run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(report::Failure::Unread) => ExitCode::SUCCESS,
        Err(failure) => {
            console::talk!("{failure}");
            ExitCode::from(failure.code())
        }
    }
}

//! Why something could not be done.

use std::path::Path;

use polyhead_models::surgery::SurgeryError;
use polyhead_recipe::{Problem, Problems};
use polyhead_training::run_folder::FileError;

/// Why something could not be done; a program chooses its exit code by it.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The recipe or the command line is wrong: exit code 2.
    #[error("{0}")]
    Usage(Problems),
    /// The run failed: exit code 1.
    #[error("error: {0}")]
    Run(String),
    /// Nobody reads standard output any more, as with `| head`. There is nothing to add: exit code 0.
    #[error("standard output is closed")]
    Unread,
    /// A signal ended the run, which is saved: exit code 128 + signal.
    #[error("interrupted")]
    Interrupted(usize),
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self::Usage(problem.into())
    }
}

impl From<Problems> for Failure {
    fn from(problems: Problems) -> Self {
        Self::Usage(problems)
    }
}

macro_rules! fails_the_run {
    ($($error:ty),+) => { $(impl From<$error> for Failure {
        fn from(error: $error) -> Self { Self::Run(error.to_string()) }
    })+ };
}

fails_the_run!(
    polyhead_training::TrainError,
    polyhead_training::checkpoint::CheckpointError,
    polyhead_training::run_folder::RunFolderError,
    FileError,
    polyhead_data::DataError,
    polyhead_models::weights::WeightsError,
    polyhead_models::hf::ImportError,
    std::io::Error
);

impl Failure {
    /// A file could not be used: what was attempted, as a verb, and why not.
    pub fn file(action: &'static str, path: &Path, cause: std::io::Error) -> Self {
        FileError { action, path: path.to_owned(), cause }.into()
    }
}

impl From<SurgeryError> for Failure {
    fn from(error: SurgeryError) -> Self {
        match error {
            SurgeryError::Refused(problem) => Problems::plain(problem).into(),
            SurgeryError::Weights(error) => error.into(),
        }
    }
}

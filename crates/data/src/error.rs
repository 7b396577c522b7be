//! What can be wrong with data.
//!
//! Of a setting, while nothing is opened yet, a [`Problem`](crate::Problem) says the field and the rule. Everything else is a
//! [`DataError`], which names the file, the line where there are lines, the value, the rule and the way out; what finds the
//! problem inside of a file says it in words (`Result<_, String>`), and who knows the place adds that.

use std::fmt::Display;
use std::path::{Path, PathBuf};

/// Why data cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file could not be read or written.
    #[error("{}: {cause}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// A setting or a text that cannot be used: what, the rule, the way out.
    #[error("{0}")]
    Unusable(String),
    /// A row of a file is malformed.
    #[error("{}:{line}: {problem}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A tokenizer cannot be used.
    #[error("tokenizer {}: {problem}", path.display())]
    Tokenizer {
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

/// [`DataError::Unusable`] with these words, as `format!` takes them.
macro_rules! unusable {
    ($($words:tt)*) => {
        $crate::DataError::Unusable(format!($($words)*))
    };
}

impl DataError {
    /// What is wrong with the content of a file, and the way out.
    pub(crate) fn in_file(path: &Path, problem: impl Display) -> Self {
        unusable!("{}: {problem}", path.display())
    }
}

/// Says which file an operation was about.
pub(crate) trait At<T> {
    /// The error with its file.
    fn at(self, path: &Path) -> Result<T, DataError>;
}

impl<T> At<T> for std::io::Result<T> {
    fn at(self, path: &Path) -> Result<T, DataError> {
        self.map_err(|cause| DataError::File { path: path.to_owned(), cause })
    }
}

//! The binary as a user sees it.

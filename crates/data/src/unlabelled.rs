//! Images without classes, for super-resolution: from files or generated. An image is a pure function of (seed, side, epoch, index).

mod image_files;
mod patterns;

pub use image_files::ImageFilesConfig;
pub use patterns::PatternsConfig;

#[cfg(test)]
mod tests;

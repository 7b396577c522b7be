//! Audio for classifiers, as log-mel images.

mod chirps;
mod fourier;
mod log_mel;
mod wav;
mod wav_folder;

pub use chirps::ChirpsConfig;
pub use wav_folder::WavFolderConfig;

//! Folders of images: one folder a class.

use std::path::PathBuf;

use polyhead_models::InputShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Images;
use crate::examples::class_folders::ClassFolders;
use crate::files::OnBad;
use crate::image_file::{ENDINGS, Image, ImageNotes, decode};
use crate::problem::{Problem, image_size, require, shown};
use crate::source::Source;
use crate::{Data, DataError, Opening};

/// What red, green and blue add to brightness (ITU-R BT.601).
const BRIGHTNESS: [f32; 3] = [0.299, 0.587, 0.114];

/// `[data.image_folder]`: images in folders that are named for their classes: PNG, JPEG, WebP, GIF, TIFF and BMP of any kind, the
/// way up that their EXIF data says; what is transparent is laid on black, of several frames or pages the first is taken. Every
/// image is brought to one size: as small as it may be to cover it, cut to its middle.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageFolderConfig {
    /// The folder with a folder for each class.
    pub path: PathBuf,
    /// Such a folder to validate on. Default: a share of the others, validation.fraction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_path: Option<PathBuf>,
    /// Height and width that images are brought to.
    pub size: [usize; 2],
    /// 3 (default) for colours, 1 for grey.
    #[serde(default = "three")]
    pub channels: usize,
    /// What is done with an image that is damaged, cut off or of an unknown kind: "error" (default), or "skip", which counts
    /// and names what it leaves out.
    #[serde(default, skip_serializing_if = "crate::problem::is_default")]
    pub on_bad_file: OnBad,
}

fn three() -> usize {
    3
}

impl Source for ImageFolderConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        image_size(self.size)?;
        require([1, 3].contains(&self.channels), "channels", || {
            format!("channels ({}) must be 3 for colours or 1 for grey", self.channels)
        })
    }

    fn paths(&self) -> Vec<String> {
        shown([&self.path].into_iter().chain(&self.validation_path))
    }

    fn shape(&self) -> Option<InputShape> {
        let [height, width] = self.size;
        Some(InputShape::Images { channels: self.channels, height, width })
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        let [height, width] = self.size;
        let mut told = ImageNotes::default();
        let folders = ClassFolders {
            name: opening.name,
            path: &self.path,
            validation_path: self.validation_path.as_ref(),
            endings: &ENDINGS,
            on_bad_file: self.on_bad_file,
        };
        let read = folders.read(|bytes, _| {
            let image = decode(bytes)?;
            told.add(&image);
            Ok(fitted(&image, height, width, self.channels))
        })?;
        let notes = read.left_out.note().into_iter().chain(told.told()).collect();
        let shape = InputShape::Images { channels: self.channels, height, width };
        let images = |items: Vec<(Vec<u8>, u32)>| {
            let (pixels, labels): (Vec<Vec<u8>>, Vec<u32>) = items.into_iter().unzip();
            Images { shape, pixels: pixels.concat(), labels, classes: read.classes.clone() }
        };
        let mut train = read.items;
        let held_out = train.split_off(read.to_train);
        let held_out = self.validation_path.as_ref().map(|_| images(held_out));
        images(train).open(held_out, ("image files", notes, None), opening)
    }
}

/// `[channels, height, width]`: the middle of the image, each pixel the mean of what it covers.
fn fitted(image: &Image, height: usize, width: usize, channels: usize) -> Vec<u8> {
    let scale = (image.height as f64 / height as f64).min(image.width as f64 / width as f64);
    let first = |all: usize, shown: usize| (all as f64 - shown as f64 * scale) / 2.0;
    let (top, left) = (first(image.height, height), first(image.width, width));
    let mut planes = vec![0; channels * height * width];
    for y in 0..height {
        let rows = covered(top + y as f64 * scale, scale, image.height);
        for x in 0..width {
            let columns = covered(left + x as f64 * scale, scale, image.width);
            let mut sums = [0f64; 3];
            let mut weight = 0.0;
            for &(row, down) in &rows {
                for &(column, across) in &columns {
                    let at = 3 * (row * image.width + column);
                    weight += down * across;
                    for (sum, &byte) in sums.iter_mut().zip(&image.pixels[at..at + 3]) {
                        *sum += down * across * f64::from(byte);
                    }
                }
            }
            let means = sums.map(|sum| (sum / weight) as f32);
            let brightness: f32 = means.iter().zip(BRIGHTNESS).map(|(mean, part)| mean * part).sum();
            for channel in 0..channels {
                let value = if channels == 1 { brightness } else { means[channel] };
                planes[(channel * height + y) * width + x] = value.round() as u8;
            }
        }
    }
    planes
}

/// The pixels from `start` on that an interval covers, each with how much of it.
fn covered(start: f64, length: f64, all: usize) -> Vec<(usize, f64)> {
    let end = (start + length).min(all as f64);
    let start = start.max(0.0);
    let pixels = start as usize..(end.ceil() as usize).min(all);
    pixels.map(|pixel| (pixel, end.min(pixel as f64 + 1.0) - start.max(pixel as f64))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_brought_to_one_size_by_means() {
        // 2 x 4: the middle 2 x 2, halved to one pixel.
        let row = |bytes: [u8; 4]| bytes.into_iter().flat_map(|byte| [byte, 0, 255]);
        let pixels = row([9, 10, 20, 9]).chain(row([9, 30, 40, 9])).collect();
        let image = Image { height: 2, width: 4, pixels, turned: false, first_of_several: false };
        let fitted = |height, width, channels| fitted(&image, height, width, channels);
        assert_eq!(fitted(1, 1, 3), [25, 0, 255]);
        assert_eq!(fitted(1, 1, 1), [(25.0 * 0.299f32 + 255.0 * 0.114).round() as u8]);
        // Enlarged, every pixel is four.
        let large = fitted(4, 8, 3);
        assert_eq!(&large[..8], [9, 9, 10, 10, 20, 20, 9, 9]);
        assert_eq!(large[8..16], large[..8]);
        assert_eq!(fitted(2, 4, 3)[..4], [9, 10, 20, 9]);
    }
}

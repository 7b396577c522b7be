//! Folders of pictures: one folder a class.

use std::collections::BTreeSet;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use polyhead_models::InputShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use zune_jpeg::JpegDecoder;

use super::Found;
use super::pictures::Pictures;
use crate::DataError;
use crate::error::At;
use crate::synthetic::Problem;
use crate::text::expand;

const ENDINGS: [&str; 3] = ["png", "jpg", "jpeg"];
/// What red, green and blue add to brightness (ITU-R BT.601).
const BRIGHTNESS: [f32; 3] = [0.299, 0.587, 0.114];

/// `[data.image_folder]`: pictures in folders that are named for their classes: PNG (of any kind; what is transparent is laid
/// on black) and JPEG. Every picture is brought to one size: as small as it may be to cover it, cut to its middle.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageFolderConfig {
    /// The folder with a folder for each class.
    pub path: PathBuf,
    /// Such a folder to validate on. Default: a share of the others, validation.fraction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_path: Option<PathBuf>,
    /// Height and width that pictures are brought to.
    pub size: [usize; 2],
    /// 3 (default) for colours, 1 for grey.
    #[serde(default = "three")]
    pub channels: usize,
}

fn three() -> usize {
    3
}

impl ImageFolderConfig {
    /// Checks the settings without touching a file.
    ///
    /// # Errors
    /// Names the field and the rule.
    pub fn validate(&self) -> Result<(), Problem> {
        if self.size.iter().any(|side| !(1..=4096).contains(side)) {
            return Err(("size", format!("size ({:?}) must be height and width, each from 1 to 4096", self.size)));
        }
        match self.channels {
            1 | 3 => Ok(()),
            other => Err(("channels", format!("channels ({other}) must be 3 for colours or 1 for grey"))),
        }
    }

    pub(super) fn read(&self) -> Result<Found, DataError> {
        let learnt = self.pictures(&self.path, None)?;
        let held_out =
            self.validation_path.as_ref().map(|path| self.pictures(path, Some(&learnt.classes))).transpose()?;
        Ok(Found { learnt, held_out })
    }

    fn pictures(&self, folder: &Path, known: Option<&[String]>) -> Result<Pictures, DataError> {
        let [height, width] = self.size;
        let (mut pixels, mut labels) = (Vec::new(), Vec::new());
        let (classes, files) = labelled_files(folder, &ENDINGS, known)?;
        for (path, label) in files {
            let picture = decode(&path)?;
            pixels.extend(picture.fitted(height, width, self.channels));
            labels.push(label);
        }
        Ok(Pictures { shape: InputShape::Images { channels: self.channels, height, width }, pixels, labels, classes })
    }
}

/// Files with the class of each.
pub(super) type LabelledFiles = Vec<(PathBuf, u32)>;

/// Classes with their files: the folders inside of a folder, sorted by name.
///
/// # Errors
/// If there are fewer than two, one holds no such file, or one is not `known`, where they are known.
pub(super) fn labelled_files(
    folder: &Path,
    endings: &[&str],
    known: Option<&[String]>,
) -> Result<(Vec<String>, LabelledFiles), DataError> {
    let unusable = |problem: String| DataError::Unusable(format!("{}: {problem}", folder.display()));
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(folder).at(folder)? {
        let path = entry.at(folder)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() && !name.starts_with('.') {
            names.insert(name);
        }
    }
    let classes = match known {
        Some(known) => known.to_vec(),
        None if names.len() < 2 => {
            return Err(unusable(format!("holds {} folders, and each is a class: two are needed", names.len())));
        }
        None => names.iter().cloned().collect(),
    };
    let mut files = Vec::new();
    for name in names {
        let label = classes.iter().position(|class| *class == name);
        let label = label.ok_or_else(|| unusable(format!("class `{name}` is not among those learnt")))?;
        let pattern = folder.join(&name).display().to_string();
        files.extend(expand(&[pattern], endings)?.into_keys().map(|path| (path, label as u32)));
    }
    Ok((classes, files))
}

/// A picture in red, green and blue.
struct Picture {
    height: usize,
    width: usize,
    /// `[height, width, 3]`
    pixels: Vec<u8>,
}

fn decode(path: &Path) -> Result<Picture, DataError> {
    let bytes = std::fs::read(path).at(path)?;
    let picture = match bytes.starts_with(&[0xff, 0xd8]) {
        true => jpeg(&bytes),
        false => png(&bytes),
    };
    picture.map_err(|problem| DataError::Unusable(format!("{}: no readable PNG or JPEG: {problem}", path.display())))
}

fn png(bytes: &[u8]) -> Result<Picture, String> {
    let mut decoder = png::Decoder::new(Cursor::new(bytes));
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().map_err(|error| error.to_string())?;
    let mut pixels = vec![0; reader.output_buffer_size().ok_or("too large")?];
    let frame = reader.next_frame(&mut pixels).map_err(|error| error.to_string())?;
    pixels.truncate(frame.buffer_size());
    let laid = |byte: u8, alpha: u8| (u16::from(byte) * u16::from(alpha) / 255) as u8;
    let pixels: Vec<u8> = match frame.color_type {
        png::ColorType::Rgb => pixels,
        png::ColorType::Grayscale => pixels.into_iter().flat_map(|grey| [grey; 3]).collect(),
        png::ColorType::GrayscaleAlpha => {
            pixels.as_chunks::<2>().0.iter().flat_map(|&[grey, alpha]| [laid(grey, alpha); 3]).collect()
        }
        png::ColorType::Rgba => {
            let rgb = |&[r, g, b, alpha]: &[u8; 4]| [r, g, b].map(|byte| laid(byte, alpha));
            pixels.as_chunks::<4>().0.iter().flat_map(rgb).collect()
        }
        png::ColorType::Indexed => return Err("a palette that could not be read".into()),
    };
    Ok(Picture { height: frame.height as usize, width: frame.width as usize, pixels })
}

fn jpeg(bytes: &[u8]) -> Result<Picture, String> {
    let mut decoder = JpegDecoder::new(Cursor::new(bytes));
    let pixels = decoder.decode().map_err(|error| format!("{error:?}"))?;
    let info = decoder.info().ok_or("no size")?;
    let (height, width) = (usize::from(info.height), usize::from(info.width));
    let pixels = match pixels.len() {
        grey if grey == height * width => pixels.into_iter().flat_map(|grey| [grey; 3]).collect(),
        colours if colours == 3 * height * width => pixels,
        other => return Err(format!("{other} numbers for {height} x {width} pixels")),
    };
    Ok(Picture { height, width, pixels })
}

impl Picture {
    /// `[channels, height, width]`: the middle of the picture, each pixel the mean of what it covers.
    fn fitted(&self, height: usize, width: usize, channels: usize) -> Vec<u8> {
        let scale = (self.height as f64 / height as f64).min(self.width as f64 / width as f64);
        let first = |all: usize, shown: usize| (all as f64 - shown as f64 * scale) / 2.0;
        let (top, left) = (first(self.height, height), first(self.width, width));
        let mut planes = vec![0; channels * height * width];
        for y in 0..height {
            let rows = covered(top + y as f64 * scale, scale, self.height);
            for x in 0..width {
                let columns = covered(left + x as f64 * scale, scale, self.width);
                let mut sums = [0f64; 3];
                let mut weight = 0.0;
                for &(row, down) in &rows {
                    for &(column, across) in &columns {
                        let at = 3 * (row * self.width + column);
                        weight += down * across;
                        for (sum, &byte) in sums.iter_mut().zip(&self.pixels[at..at + 3]) {
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
    fn pictures_are_brought_to_one_size_by_means() {
        // 2 x 4: the middle 2 x 2, halved to one pixel.
        let row = |bytes: [u8; 4]| bytes.into_iter().flat_map(|byte| [byte, 0, 255]);
        let pixels = row([9, 10, 20, 9]).chain(row([9, 30, 40, 9])).collect();
        let picture = Picture { height: 2, width: 4, pixels };
        assert_eq!(picture.fitted(1, 1, 3), [25, 0, 255]);
        assert_eq!(picture.fitted(1, 1, 1), [(25.0 * 0.299f32 + 255.0 * 0.114).round() as u8]);
        // Enlarged, every pixel is four.
        let large = picture.fitted(4, 8, 3);
        assert_eq!(&large[..8], [9, 9, 10, 10, 20, 20, 9, 9]);
        assert_eq!(large[8..16], large[..8]);
        assert_eq!(picture.fitted(2, 4, 3)[..4], [9, 10, 20, 9]);
    }
}

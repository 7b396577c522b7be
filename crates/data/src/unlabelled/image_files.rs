//! Squares of image files of any size.

use std::sync::Arc;

use polyhead_models::InputShape;
use rand::RngExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::batches::{ImageLoader, ImageSet, LoaderOptions, Order, Samples};
use crate::examples::divide;
use crate::files::{LeftOut, OnBad, read_file, search};
use crate::image_file::{ENDINGS, Image, ImageNotes, decode};
use crate::problem::{Problem, some_path, within};
use crate::random::{generator, mix};
use crate::{Data, DataError, Opening, Source};

/// `[data.image_files]`: images of any size and of the kinds that `image_folder` reads, without classes. In every epoch a random
/// square is cut from each; of those to validate on always the middle.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageFilesConfig {
    /// Files, folders and patterns.
    pub paths: Vec<String>,
    /// The same, to validate on. Default: a share of the others, validation.fraction.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub validation_paths: Vec<String>,
    /// Side of the squares in pixels. Default: 64.
    #[serde(default = "size")]
    pub size: usize,
    /// Turn and mirror squares to train on by chance, in all eight ways. Default: true.
    #[serde(default = "yes")]
    pub turn: bool,
    /// What is done with an image that is damaged, cut off, of an unknown kind or smaller than a square: "error" (default), or "skip",
    /// which counts and names what it leaves out.
    #[serde(default, skip_serializing_if = "crate::problem::is_default")]
    pub on_bad_file: OnBad,
}

fn size() -> usize {
    64
}

fn yes() -> bool {
    true
}

impl Source for ImageFilesConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        some_path(&self.paths)?;
        within("size", self.size, 1..=4096)
    }

    fn paths(&self) -> Vec<String> {
        self.paths.iter().chain(&self.validation_paths).cloned().collect()
    }

    fn shape(&self) -> Option<InputShape> {
        Some(InputShape::Images { channels: 3, height: self.size, width: self.size })
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        let (options, mut notes, mut left_out) = (opening.options, ImageNotes::default(), LeftOut::default());
        let mut images = self.read(&self.paths, opening.name, (&mut notes, &mut left_out))?;
        let to_train = images.len();
        if !self.validation_paths.is_empty() {
            images.extend(self.read(&self.validation_paths, opening.name, (&mut notes, &mut left_out))?);
        }
        let mut hash = blake3::Hasher::new();
        for image in &images {
            hash.update(format!("{} {}", image.height, image.width).as_bytes());
            hash.update(&image.pixels);
        }
        let [train, validation] = divide(images.len(), to_train, options.validation_fraction)?;
        let description = format!(
            "image files, squares of {side} x {side} pixels: {} for training, {} for validation",
            train.len(),
            validation.len(),
            side = self.size
        );
        let (size, seed, images) = (self.size, options.seed, Arc::new(images));
        let loader = |indices, order, cut| {
            let squares = Arc::new(Squares { images: images.clone(), indices, size, seed, cut });
            ImageLoader::new(squares, [size; 2], LoaderOptions::of(options, order))
        };
        Ok(Data::Images(Box::new(ImageSet {
            train: loader(train, Order::Shuffled, Cut::Random { turn: self.turn }),
            validation: loader(validation, Order::Once, Cut::Middle),
            description,
            notes: left_out.note().into_iter().chain(notes.told()).collect(),
            text_hash: Some(hash.finalize().to_hex().to_string()),
        })))
    }
}

impl ImageFilesConfig {
    /// The images of files, at least one.
    fn read(
        &self,
        paths: &[String],
        name: &str,
        (notes, left_out): (&mut ImageNotes, &mut LeftOut),
    ) -> Result<Vec<Image>, DataError> {
        let found = search(paths, &[&ENDINGS])?;
        left_out.extend(found.left_out);
        let mut images = Vec::new();
        for path in found.files.into_keys() {
            let image = decode(&read_file(&path)?).and_then(|image| self.large_enough(image));
            if let Some(image) = self.on_bad_file.settle(image, (&path, name), left_out)? {
                notes.add(&image);
                images.push(image);
            }
        }
        match images.is_empty() {
            true => Err(unusable!("data.{name}: no image can be read; {}", left_out.note().unwrap_or_default())),
            false => Ok(images),
        }
    }

    fn large_enough(&self, image: Image) -> Result<Image, String> {
        let (Image { height, width, .. }, size) = (&image, self.size);
        match height.min(width) >= &size {
            true => Ok(image),
            false => Err(format!(
                "{width} x {height} pixels are less than the squares of {size} x {size} that are cut from it (size)"
            )),
        }
    }
}

/// Where squares are cut.
#[derive(Debug, Clone, Copy)]
enum Cut {
    Random { turn: bool },
    Middle,
}

/// Squares of some of the images.
struct Squares {
    images: Arc<Vec<Image>>,
    indices: Vec<u32>,
    size: usize,
    seed: u64,
    cut: Cut,
}

impl Samples<Vec<f32>> for Squares {
    fn per_epoch(&self) -> u64 {
        self.indices.len() as u64
    }

    fn sample(&self, epoch: u64, index: u64) -> Result<Vec<f32>, DataError> {
        let image = &self.images[self.indices[index as usize] as usize];
        let free = [image.height, image.width].map(|length| length - self.size);
        let (first, turned) = match self.cut {
            Cut::Middle => (free.map(|free| free / 2), 0),
            Cut::Random { turn } => {
                let mut rng = generator(mix(self.seed, epoch), index);
                let first = free.map(|free| rng.random_range(0..=free));
                (first, if turn { rng.random_range(0..8) } else { 0 })
            }
        };
        Ok(square(image, first, self.size, turned))
    }
}

/// `[3, size, size]`, from 0 to 1: a square of an image, in one of the eight ways that a square can lie.
fn square(image: &Image, [top, left]: [usize; 2], size: usize, turned: u32) -> Vec<f32> {
    let [flipped, mirrored, exchanged] = [1, 2, 4].map(|bit| turned & bit != 0);
    let end = |at: usize, back: bool| if back { size - 1 - at } else { at };
    let mut planes = vec![0.0; 3 * size * size];
    for (at, value) in planes.iter_mut().enumerate() {
        let (colour, y, x) = (at / (size * size), at / size % size, at % size);
        let (y, x) = if exchanged { (x, y) } else { (y, x) };
        let (row, column) = (top + end(y, flipped), left + end(x, mirrored));
        *value = f32::from(image.pixels[3 * (row * image.width + column) + colour]) / 255.0;
    }
    planes
}

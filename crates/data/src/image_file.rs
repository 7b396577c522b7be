//! Image files to pixels: PNG, JPEG, WebP, GIF, TIFF and BMP, recognized by content. What is cut off or damaged is an error, never
//! an image that is grey below; images are turned the way up that their EXIF data says, as every viewer shows them.

use std::io::Cursor;
use std::path::Path;

use image::codecs::{bmp::BmpDecoder, gif::GifDecoder, tiff::TiffDecoder, webp::WebPDecoder};
use image::metadata::Orientation;
use image::{AnimationDecoder, DynamicImage, ImageDecoder, ImageFormat, RgbImage};
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::options::DecoderOptions;

use crate::DataError;
use crate::files::read_file;

/// How the names of image files end.
pub(crate) const ENDINGS: [&str; 10] = ["png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "tif", "tiff", "bmp"];

/// The most pixels that are unpacked: a header of a few bytes can promise any number. As Pillow's limit.
const MOST_PIXELS: u64 = 178_956_970;

/// An image in red, green and blue.
#[derive(Debug, PartialEq)]
pub struct Image {
    /// Pixels down.
    pub height: usize,
    /// Pixels across.
    pub width: usize,
    /// `[height, width, 3]`
    pub pixels: Vec<u8>,
    /// Whether its file stores it another way up.
    pub turned: bool,
    /// Whether its file holds more images, of which this is the first.
    pub first_of_several: bool,
}

impl Image {
    /// `[3, height, width]`, from 0 to 1.
    pub fn planes(&self) -> Vec<f32> {
        let colour = |colour| self.pixels.iter().skip(colour).step_by(3).map(|&byte| f32::from(byte) / 255.0);
        (0..3).flat_map(colour).collect()
    }
}

/// What there is to tell of images that were read.
#[derive(Debug, Default)]
pub(crate) struct ImageNotes {
    turned: usize,
    of_several: usize,
}

impl ImageNotes {
    pub(crate) fn add(&mut self, image: &Image) {
        self.turned += usize::from(image.turned);
        self.of_several += usize::from(image.first_of_several);
    }

    /// In words.
    pub(crate) fn told(&self) -> impl Iterator<Item = String> + use<> {
        let counts = [
            (self.turned, "images were turned the way up that their EXIF orientation says"),
            (self.of_several, "files hold several frames or pages, of which the first is taken"),
        ];
        counts.into_iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}"))
    }
}

/// Reads an image file of any of these kinds.
///
/// # Errors
/// If it cannot be read: what is wrong with it.
pub fn read_image(path: &Path) -> Result<Image, DataError> {
    decode(&read_file(path)?).map_err(|problem| DataError::in_file(path, problem))
}

/// What a decoder found.
struct Raw {
    image: DynamicImage,
    orientation: Orientation,
    several: bool,
}

/// The image of a file.
///
/// # Errors
/// What is wrong with it, in words.
pub(crate) fn decode(bytes: &[u8]) -> Result<Image, String> {
    let format = image::guess_format(bytes).map_err(|_| match bytes.get(4..8) {
        _ if bytes.is_empty() => "the file is empty".to_owned(),
        Some(b"ftyp") => "HEIC or another kind that is not read: save it as PNG or JPEG".into(),
        _ => "not a readable image (PNG, JPEG, WebP, GIF, TIFF, BMP)".into(),
    })?;
    let raw = match format {
        ImageFormat::Jpeg => jpeg(bytes),
        ImageFormat::Png => png(bytes),
        ImageFormat::WebP => webp(bytes),
        ImageFormat::Gif => gif(bytes),
        ImageFormat::Tiff => tiff(bytes),
        ImageFormat::Bmp => {
            opened(BmpDecoder::new(Cursor::new(bytes)).map_err(words)?).map(|image| Raw::plain(image, false))
        }
        other => Err(format!("images of the kind {other:?} are not read: save it as PNG or JPEG")),
    };
    let Raw { mut image, orientation, several } = raw.map_err(|problem| format!("{}: {problem}", name(format)))?;
    let turned = orientation != Orientation::NoTransforms;
    image.apply_orientation(orientation);
    let image = image.into_rgb8();
    let (width, height) = image.dimensions();
    let (height, width) = (height as usize, width as usize);
    Ok(Image { height, width, pixels: image.into_raw(), turned, first_of_several: several })
}

impl Raw {
    fn plain(image: DynamicImage, several: bool) -> Self {
        Self { image, orientation: Orientation::NoTransforms, several }
    }
}

fn name(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Jpeg => "not a readable JPEG",
        ImageFormat::Png => "not a readable PNG",
        ImageFormat::WebP => "not a readable WebP",
        ImageFormat::Gif => "not a readable GIF",
        ImageFormat::Tiff => "not a readable TIFF",
        _ => "not a readable image",
    }
}

fn words(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Refuses sizes that no image to learn from has, before memory is asked for.
fn fits(width: u64, height: u64) -> Result<(), String> {
    match width.checked_mul(height) {
        Some(pixels @ 1..) if pixels <= MOST_PIXELS => Ok(()),
        _ => Err(format!("its header promises {width} x {height} pixels; 1 to {MOST_PIXELS} in all are read")),
    }
}

/// The pixels of a decoder; what is transparent is laid on black.
fn opened(mut decoder: impl ImageDecoder) -> Result<DynamicImage, String> {
    let (width, height) = decoder.dimensions();
    fits(width.into(), height.into())?;
    let mut limits = image::Limits::no_limits();
    // Colours of up to 16 bytes a pixel, and as much again to work in.
    limits.max_alloc = Some(32 * MOST_PIXELS);
    decoder.set_limits(limits).map_err(words)?;
    let image = DynamicImage::from_decoder(decoder).map_err(words)?;
    Ok(match image.color().has_alpha() {
        true => {
            let rgba = image.into_rgba8();
            rgb(width, height, rgba.as_raw().as_chunks::<4>().0.iter().flat_map(on_black).collect())?
        }
        false => image,
    })
}

fn rgb(width: u32, height: u32, pixels: Vec<u8>) -> Result<DynamicImage, String> {
    let numbers = pixels.len();
    let image = RgbImage::from_raw(width, height, pixels).map(DynamicImage::ImageRgb8);
    image.ok_or_else(|| format!("{numbers} numbers for {width} x {height} pixels"))
}

fn on_black(&[r, g, b, alpha]: &[u8; 4]) -> [u8; 3] {
    [r, g, b].map(|byte| laid(byte, alpha))
}

fn laid(byte: u8, alpha: u8) -> u8 {
    (u16::from(byte) * u16::from(alpha) / 255) as u8
}

/// Which way up EXIF data says an image is.
fn orientation(exif: Option<&[u8]>) -> Orientation {
    let exif = exif.map(|exif| exif.strip_prefix(b"Exif\0\0").unwrap_or(exif));
    exif.and_then(Orientation::from_exif_chunk).unwrap_or(Orientation::NoTransforms)
}

fn png(bytes: &[u8]) -> Result<Raw, String> {
    let mut decoder = png::Decoder::new(Cursor::new(bytes));
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().map_err(words)?;
    let (width, height) = reader.info().size();
    fits(width.into(), height.into())?;
    let mut pixels = vec![0; reader.output_buffer_size().ok_or("too large")?];
    let frame = reader.next_frame(&mut pixels).map_err(words)?;
    pixels.truncate(frame.buffer_size());
    // To the end: EXIF data may come last, and a file without an end was cut off.
    reader.finish().map_err(words)?;
    let pixels: Vec<u8> = match frame.color_type {
        png::ColorType::Rgb => pixels,
        png::ColorType::Grayscale => pixels.into_iter().flat_map(|grey| [grey; 3]).collect(),
        png::ColorType::GrayscaleAlpha => {
            pixels.as_chunks::<2>().0.iter().flat_map(|&[grey, alpha]| [laid(grey, alpha); 3]).collect()
        }
        png::ColorType::Rgba => pixels.as_chunks::<4>().0.iter().flat_map(on_black).collect(),
        png::ColorType::Indexed => return Err("a palette that was not read".into()),
    };
    let info = reader.info();
    let (orientation, several) = (orientation(info.exif_metadata.as_deref()), info.animation_control.is_some());
    Ok(Raw { image: rgb(frame.width, frame.height, pixels)?, orientation, several })
}

fn webp(bytes: &[u8]) -> Result<Raw, String> {
    let mut decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(words)?;
    let orientation = orientation(decoder.exif_metadata().map_err(words)?.as_deref());
    let several = decoder.has_animation();
    Ok(Raw { orientation, ..Raw::plain(opened(decoder)?, several) })
}

fn gif(bytes: &[u8]) -> Result<Raw, String> {
    let decoder = || GifDecoder::new(Cursor::new(bytes)).map_err(words);
    let image = opened(decoder()?)?;
    let several = match decoder()?.into_frames().nth(1) {
        None => false,
        Some(Ok(_)) => true,
        Some(Err(error)) => return Err(words(error)),
    };
    Ok(Raw::plain(image, several))
}

fn tiff(bytes: &[u8]) -> Result<Raw, String> {
    let mut decoder = TiffDecoder::new(Cursor::new(bytes)).map_err(words)?;
    let orientation = decoder.orientation().map_err(words)?;
    Ok(Raw { orientation, ..Raw::plain(opened(decoder)?, several_pages(bytes).unwrap_or(false)) })
}

/// Whether a TIFF's first directory names another one (TIFF 6.0, section 2).
fn several_pages(bytes: &[u8]) -> Option<bool> {
    let little = bytes.starts_with(b"II*");
    let number = |at: usize, width: usize| {
        let digits = bytes.get(at..at.checked_add(width)?)?;
        let fold = |sum: usize, byte: &u8| sum << 8 | usize::from(*byte);
        Some(if little { digits.iter().rev().fold(0, fold) } else { digits.iter().fold(0, fold) })
    };
    let first = number(4, 4)?;
    let next = number(first.checked_add(2 + 12 * number(first, 2)?)?, 4)?;
    Some(next != 0)
}

fn jpeg(bytes: &[u8]) -> Result<Raw, String> {
    let Scans { end, count, sequential } = Scans::of(bytes).ok_or("it is cut off: there is no end-of-image marker")?;
    // A decoder fills up with zeros what an end that comes too early leaves out, which is grey. Ones in front of the end are the
    // padding of the last byte to an image that is whole, and no code to one that is not.
    let mut padded = bytes[..end].to_vec();
    if count == 1 && sequential {
        padded.extend([0xff, 0].repeat(16));
    }
    padded.extend([0xff, 0xd9]);
    let options = DecoderOptions::default().set_strict_mode(true);
    let mut decoder = JpegDecoder::new_with_options(Cursor::new(padded), options);
    let broken = |error: zune_jpeg::errors::DecodeErrors| format!("it is cut off or damaged: {error:?}");
    decoder.decode_headers().map_err(broken)?;
    let (width, height) = decoder.dimensions().ok_or("no size")?;
    fits(width as u64, height as u64)?;
    let pixels = decoder.decode().map_err(broken)?;
    let pixels = match pixels.len() {
        grey if grey == height * width => pixels.into_iter().flat_map(|grey| [grey; 3]).collect(),
        _ => pixels,
    };
    let orientation = orientation(decoder.exif().map(Vec::as_slice));
    Ok(Raw { image: rgb(width as u32, height as u32, pixels)?, orientation, several: false })
}

/// What a JPEG's markers say (ITU-T T.81, annex B).
struct Scans {
    /// Where the end-of-image marker is.
    end: usize,
    count: usize,
    /// Whether its frame is baseline or extended sequential, Huffman-coded.
    sequential: bool,
}

impl Scans {
    /// Walks over all segments; `None` if the bytes end before the image does.
    fn of(bytes: &[u8]) -> Option<Self> {
        let (mut at, mut count, mut sequential) = (2, 0, false);
        loop {
            // Over what a scan holds: zeros behind 0xff are data, and restarts go on with the scan.
            while *bytes.get(at)? != 0xff || matches!(*bytes.get(at + 1)?, 0 | 0xff | 0xd0..=0xd7) {
                at += 1;
            }
            match bytes[at + 1] {
                0xd9 => return Some(Self { end: at, count, sequential }),
                0x01 | 0xd8 => at += 2,
                marker => {
                    count += usize::from(marker == 0xda);
                    sequential |= matches!(marker, 0xc0 | 0xc1);
                    let length = u16::from_be_bytes([*bytes.get(at + 2)?, *bytes.get(at + 3)?]);
                    at += 2 + usize::from(length);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;

//! A sheet of small images, side by side in their own colours.

use super::{GAP, ImageError, MAX_PIXELS, Png};

/// About as large as one image is shown, in pixels (chosen by us).
const SHOWN: usize = 96;
/// Between images.
const GROUND: u8 = 0xd8;

/// How images are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sheet {
    /// 3 for red, green and blue; of any other number the first is shown in grey.
    pub channels: usize,
    /// Pixels down.
    pub height: usize,
    /// Pixels across.
    pub width: usize,
    /// Images in a row.
    pub across: usize,
}

/// Draws images, each `[channels, height, width]`. All share one scale: the smallest value of all is black, the largest white.
///
/// # Errors
/// If there is none, or one is not of the size that is told.
pub fn sheet(images: &[&[f32]], layout: Sheet) -> Result<Png, ImageError> {
    let Sheet { channels, height, width, across } = layout;
    for (what, size) in [("images", images.len()), ("height", height), ("width", width), ("across", across)] {
        if size == 0 {
            return Err(ImageError::Empty { what });
        }
    }
    if let Some(wrong) = images.iter().find(|image| image.len() != channels * height * width) {
        return Err(ImageError::Shape { rows: channels * height, cols: width, found: wrong.len() });
    }
    let (low, high) = super::extent(images.iter().copied());
    let byte =
        |value: f32| (255.0 * ((value - low) / (high - low).max(f32::MIN_POSITIVE)).clamp(0.0, 1.0)).round() as u8;
    let scale = (SHOWN / height.max(width)).max(1);
    let (columns, rows) = (across.min(images.len()), images.len().div_ceil(across));
    let side = |count: usize, pixels: usize| count * (pixels * scale + GAP) - GAP;
    let (all_width, all_height) = (side(columns, width), side(rows, height));
    if (all_width as u64).checked_mul(all_height as u64).is_none_or(|pixels| pixels > MAX_PIXELS) {
        return Err(ImageError::TooLarge { width: all_width as u64, height: all_height as u64 });
    }
    let mut bytes = vec![GROUND; 3 * all_width * all_height];
    for (index, image) in images.iter().enumerate() {
        let (left, top) = (index % across * (width * scale + GAP), index / across * (height * scale + GAP));
        for y in 0..height * scale {
            for x in 0..width * scale {
                let from = y / scale * width + x / scale;
                let to = 3 * ((top + y) * all_width + left + x);
                for (colour, target) in bytes[to..to + 3].iter_mut().enumerate() {
                    let plane = if channels == 3 { colour } else { 0 };
                    *target = byte(image[plane * height * width + from]);
                }
            }
        }
    }
    encode(bytes, all_width, all_height)
}

/// An image `[3, height, width]` from 0 to 1, pixel by pixel in its own colours.
///
/// # Errors
/// If it is not of the size that is told.
pub fn coloured(pixels: &[f32], [height, width]: [usize; 2]) -> Result<Png, ImageError> {
    let area = height * width;
    if pixels.len() != 3 * area {
        return Err(ImageError::Shape { rows: 3 * height, cols: width, found: pixels.len() });
    }
    let byte = |at: usize| (pixels[at].clamp(0.0, 1.0) * 255.0).round() as u8;
    let bytes = (0..area).flat_map(|at| [0, 1, 2].map(|colour| byte(colour * area + at))).collect();
    encode(bytes, width, height)
}

/// A PNG file of `[height, width, 3]` bytes.
fn encode(bytes: Vec<u8>, width: usize, height: usize) -> Result<Png, ImageError> {
    let failed = |error: png::EncodingError| ImageError::Encode(error.to_string());
    let (width, height) = (width as u32, height as u32);
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header().map_err(failed)?;
    writer.write_image_data(&bytes).map_err(failed)?;
    writer.finish().map_err(failed)?;
    Ok(Png { width, height, bytes: file })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn images_stand_side_by_side_in_their_colours() {
        let red = [1.0, -1.0, -1.0];
        let white = [1.0; 3];
        let layout = Sheet { channels: 3, height: 1, width: 1, across: 2 };
        let png = sheet(&[&red, &white, &red], layout).unwrap();
        assert_eq!((png.width, png.height), (96 * 2 + 2, 96 * 2 + 2));
        let mut reader = png::Decoder::new(std::io::Cursor::new(png.bytes)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        let at = |x: usize, y: usize| &pixels[3 * (y * 194 + x)..][..3];
        assert_eq!(at(0, 0), [255, 0, 0]);
        assert_eq!(at(100, 50), [255, 255, 255]);
        assert_eq!(at(97, 50), [0xd8; 3]);
        assert_eq!(at(5, 190), [255, 0, 0]);
        assert!(sheet(&[], layout).is_err() && sheet(&[&[0.0]], layout).is_err());
    }
}

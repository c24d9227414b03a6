//! Image files as pixels.

use std::io::Cursor;

use image::{DynamicImage, ImageDecoder, ImageReader, Limits, Rgb, RgbImage, imageops::FilterType};
use sarai_core::image::Image;

use crate::Error;

/// The longest side that is read, and the most pixels: a camera's largest photos. What an image says of itself is looked at
/// before any of it is decoded.
const LONGEST_SIDE: u32 = 16_384;
const MOST_PIXELS: u64 = 64_000_000;
/// The most memory that decoding may take: the pixels of the largest image with 16 bits and four channels.
const MOST_MEMORY: u64 = MOST_PIXELS * 8;
/// Larger images are made smaller to this: models see less than that in any case, and pixels take three bytes each.
const KEPT_SIDE: u32 = 2048;
/// A side that is so many times the other leaves no pixel of the shorter one when it is made smaller.
const MOST_NARROW: u32 = 200;

/// What is seen: rows of pixels from the top, three bytes each, red, green and blue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Picture {
    pub(crate) width: u32,
    pub(crate) height: u32,
    pub(crate) rgb: Vec<u8>,
}

/// Reads an image file: turned as its camera says, on white where it is transparent.
pub(crate) fn decode(image: &Image) -> Result<Picture, Error> {
    super::guarded(|reason| Error::BadImage { reason }, || decode_file(image))
}

fn decode_file(image: &Image) -> Result<Picture, Error> {
    let bad = |error: image::ImageError| Error::BadImage { reason: error.to_string() };
    let mut reader = ImageReader::new(Cursor::new(image.bytes()))
        .with_guessed_format()
        .map_err(|error| Error::BadImage { reason: error.to_string() })?;
    let mut limits = Limits::default();
    limits.max_image_width = Some(LONGEST_SIDE);
    limits.max_image_height = Some(LONGEST_SIDE);
    limits.max_alloc = Some(MOST_MEMORY);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(bad)?;
    let (width, height) = decoder.dimensions();
    check_size(width, height)?;
    let orientation = decoder.orientation().map_err(bad)?;
    let mut decoded = DynamicImage::from_decoder(decoder).map_err(bad)?;
    if width.max(height) > KEPT_SIDE {
        decoded = decoded.resize(KEPT_SIDE, KEPT_SIDE, FilterType::Triangle);
    }
    decoded.apply_orientation(orientation);
    let rgb = on_white(decoded);
    let (width, height) = rgb.dimensions();
    Ok(Picture { width, height, rgb: rgb.into_raw() })
}

fn check_size(width: u32, height: u32) -> Result<(), Error> {
    let (long, short) = (width.max(height), width.min(height));
    let reason = if short == 0 {
        "it has no pixels".to_owned()
    } else if u64::from(width) * u64::from(height) > MOST_PIXELS {
        format!("it has {width}×{height} pixels, more than {MOST_PIXELS} together")
    } else if long / short >= MOST_NARROW {
        format!("it has {width}×{height} pixels, too narrow to be seen")
    } else {
        return Ok(());
    };
    Err(Error::BadImage { reason })
}

fn on_white(image: DynamicImage) -> RgbImage {
    if !image.has_alpha() {
        return image.into_rgb8();
    }
    let rgba = image.into_rgba8();
    RgbImage::from_fn(rgba.width(), rgba.height(), |x, y| {
        let [red, green, blue, alpha] = rgba.get_pixel(x, y).0.map(u16::from);
        Rgb([red, green, blue].map(|colour| ((colour * alpha + 255 * (255 - alpha) + 127) / 255) as u8))
    })
}

#[cfg(test)]
mod tests {
    use image::{ImageFormat, Rgba, RgbaImage};
    use proptest::prelude::*;

    use super::*;

    fn file(image: &DynamicImage, format: ImageFormat) -> Image {
        let mut file = Cursor::new(Vec::new());
        image.write_to(&mut file, format).unwrap();
        Image::new(file.into_inner()).unwrap()
    }

    fn colourful(width: u32, height: u32) -> DynamicImage {
        RgbImage::from_fn(width, height, |x, y| Rgb([(x * 8) as u8, (y * 8) as u8, 77])).into()
    }

    #[test]
    fn all_formats_give_their_pixels() {
        let image = colourful(24, 16);
        for format in [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Jpeg, ImageFormat::Gif] {
            let picture = decode(&file(&image, format)).unwrap();
            assert_eq!((picture.width, picture.height), (24, 16), "{format:?}");
            let pixels = image.clone().into_rgb8().into_raw();
            let off = picture.rgb.iter().zip(&pixels).map(|(a, b)| u64::from(a.abs_diff(*b))).sum::<u64>();
            let mean = off / pixels.len() as u64;
            // Two of them keep less than every colour.
            let exact = matches!(format, ImageFormat::Png | ImageFormat::WebP);
            assert!(mean <= if exact { 0 } else { 12 }, "{format:?}: {mean}");
        }
    }

    #[test]
    fn what_is_transparent_is_white() {
        let half = RgbaImage::from_fn(4, 4, |x, _| Rgba([0, 0, 0, [0, 255, 128, 64][x as usize]]));
        let picture = decode(&file(&half.into(), ImageFormat::Png)).unwrap();
        assert_eq!(picture.rgb[..12].iter().step_by(3).copied().collect::<Vec<_>>(), [255, 0, 127, 191]);
    }

    #[test]
    fn a_large_image_is_made_smaller_and_an_enormous_one_is_refused_by_its_header() {
        let picture = decode(&file(&colourful(3000, 1500), ImageFormat::Png)).unwrap();
        assert_eq!((picture.width, picture.height, picture.rgb.len()), (2048, 1024, 2048 * 1024 * 3));
        let mut header = file(&colourful(1, 1), ImageFormat::Png).bytes().to_vec();
        for (width, height) in [(20_000_u32, 20_000_u32), (10_000, 10_000)] {
            header[16..20].copy_from_slice(&width.to_be_bytes());
            header[20..24].copy_from_slice(&height.to_be_bytes());
            let checksum = crc(&header[12..29]);
            header[29..33].copy_from_slice(&checksum.to_be_bytes());
            let refused = decode(&Image::new(header.clone()).unwrap()).unwrap_err();
            assert!(matches!(refused, Error::BadImage { .. }), "{refused}");
        }
    }

    /// PNG's checksum of a part.
    fn crc(bytes: &[u8]) -> u32 {
        let step = |crc: u32, byte: &u8| {
            (0..8)
                .fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
        };
        !bytes.iter().fold(u32::MAX, step)
    }

    #[test]
    fn what_is_broken_or_a_line_says_why() {
        let whole = file(&colourful(64, 64), ImageFormat::Png);
        let half = Image::new(whole.bytes()[..whole.bytes().len() / 2].to_vec()).unwrap();
        assert!(matches!(decode(&half), Err(Error::BadImage { .. })));
        let line = decode(&file(&colourful(1, 400), ImageFormat::Png)).unwrap_err().to_string();
        assert!(line.contains("1×400"), "{line}");
        assert_eq!(decode(&file(&colourful(1, 1), ImageFormat::Png)).unwrap().rgb.len(), 3);
    }

    proptest! {
        #[test]
        fn changed_bytes_never_make_it_panic(
            format in prop::sample::select(vec![ImageFormat::Png, ImageFormat::WebP, ImageFormat::Jpeg, ImageFormat::Gif]),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..10)
        ) {
            let mut bytes = file(&colourful(32, 24), format).bytes().to_vec();
            for (at, byte) in changes {
                let length = bytes.len();
                bytes[at.index(length)] = byte;
            }
            if let Ok(image) = Image::new(bytes) {
                // Whether it is still in order depends on the byte.
                let _either = decode(&image);
            }
        }
    }
}

//! The framing of event files: TFRecord.
//!
//! A record is `length: u64, masked crc32c of those 8 bytes: u32, payload, masked crc32c of the
//! payload: u32`, all little-endian.

use std::io::{self, Read};

/// Appends one record to `out`.
pub(super) fn append(out: &mut Vec<u8>, payload: &[u8]) {
    let length = (payload.len() as u64).to_le_bytes();
    out.extend_from_slice(&length);
    out.extend_from_slice(&masked_crc(&length).to_le_bytes());
    out.extend_from_slice(payload);
    out.extend_from_slice(&masked_crc(payload).to_le_bytes());
}

/// The CRC-32C rotated and shifted, so that the CRC of data that contains CRCs stays useful.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// What stands next in a stream of records.
#[derive(Debug, PartialEq)]
pub(super) enum Next {
    /// A whole record; its payload.
    Record(Vec<u8>),
    /// A record whose payload was altered. The one after it can still be read.
    Altered,
    /// The stream ends inside a record, or a length was altered: nothing after it can be read.
    Broken,
    /// The end, right after a record.
    End,
}

/// Reads the next record.
///
/// # Errors
/// Only those of `reader`; damage is a value.
pub(super) fn next(reader: &mut impl Read) -> io::Result<Next> {
    let header = up_to(reader, 12)?;
    if header.is_empty() {
        return Ok(Next::End);
    }
    let Some((length, length_crc)) = header.split_first_chunk::<8>() else {
        return Ok(Next::Broken);
    };
    if length_crc != masked_crc(length).to_le_bytes() {
        return Ok(Next::Broken);
    }
    let length = u64::from_le_bytes(*length);
    let mut payload = up_to(reader, length.saturating_add(4))?;
    if (payload.len() as u64) < length.saturating_add(4) {
        return Ok(Next::Broken);
    }
    let payload_crc = payload.split_off(payload.len() - 4);
    if payload_crc != masked_crc(&payload).to_le_bytes() {
        return Ok(Next::Altered);
    }
    Ok(Next::Record(payload))
}

/// As many as `count` bytes; fewer at the end. Allocates what is there, not what a length claims.
fn up_to(reader: &mut impl Read, count: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.by_ref().take(count).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// CRC-32C (Castagnoli, reflected 0x82f63b78) bit by bit, and the mask as TensorFlow writes it.
    fn masked_crc_by_definition(bytes: &[u8]) -> u32 {
        let mut crc = u32::MAX;
        for byte in bytes {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
            }
        }
        let crc = !crc;
        // Rotated left by 17, in a wider number.
        let wide = u64::from(crc) << 17;
        ((wide as u32) | ((wide >> 32) as u32)).wrapping_add(0xa282_ead8)
    }

    #[test]
    fn checksums_follow_their_definition() {
        // RFC 3720, appendix B.4: 32 bytes of zeros give 8a9136aa.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        for length in [0, 1, 7, 8, 9, 1000] {
            let bytes: Vec<u8> = (0..length).map(|i| (i * 37 % 251) as u8).collect();
            assert_eq!(masked_crc(&bytes), masked_crc_by_definition(&bytes));
        }
    }

    #[test]
    fn a_record_has_the_documented_bytes() {
        let mut out = Vec::new();
        append(&mut out, b"abc");
        let mut expected = vec![3, 0, 0, 0, 0, 0, 0, 0];
        expected.extend(masked_crc_by_definition(&[3, 0, 0, 0, 0, 0, 0, 0]).to_le_bytes());
        expected.extend(b"abc");
        expected.extend(masked_crc_by_definition(b"abc").to_le_bytes());
        assert_eq!(out, expected);
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_noticed() {
        let mut whole = Vec::new();
        append(&mut whole, b"first");
        let first = whole.len();
        append(&mut whole, b"second");
        for cut in 0..whole.len() {
            let mut reader = &whole[..cut];
            if cut >= first {
                assert_eq!(next(&mut reader).unwrap(), Next::Record(b"first".to_vec()));
            }
            let expected = if cut == 0 || cut == first { Next::End } else { Next::Broken };
            assert_eq!(next(&mut reader).unwrap(), expected, "cut at {cut}");
        }
        for bit in 0..first * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let mut reader = flipped.as_slice();
            match next(&mut reader).unwrap() {
                Next::Altered => {
                    assert!(bit / 8 >= 12, "bit {bit}");
                    assert_eq!(next(&mut reader).unwrap(), Next::Record(b"second".to_vec()));
                }
                Next::Broken => assert!(bit / 8 < 12, "bit {bit}"),
                other => panic!("bit {bit}: {other:?}"),
            }
        }
    }
}

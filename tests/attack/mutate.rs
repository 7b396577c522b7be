//! Small changes that make good files hostile.

use serde_json::{Map, Value, json};

use crate::random::Random;

/// What numbers in texts are replaced by.
pub const NUMBERS: [&str; 16] = [
    "-1",
    "0",
    "1",
    "7",
    "1e308",
    "1e400",
    "-1e-320",
    "NaN",
    "Infinity",
    "null",
    "65536",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "0.5",
];

/// One to three changes of the bytes: flipped bits, cut ends, pieces that are new, doubled or gone, numbers at the limits.
pub fn bytes(random: &mut Random, good: &[u8]) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for _ in 0..1 + random.below(3) {
        let at = random.below(bytes.len());
        let to = (at + 1 + random.below(64)).min(bytes.len());
        match random.below(12) {
            0 => bytes.truncate(at),
            1 if random.one_in(4) => bytes.clear(),
            2 => (0..1 + random.below(16)).for_each(|_| bytes.insert(at, random.byte())),
            3 => drop(bytes.splice(at..at, bytes[at..to].to_vec())),
            4 => drop(bytes.drain(at..to)),
            5 => extreme(random, &mut bytes, at),
            // Heads of files are short and say the most.
            6 => {
                let at = random.below(bytes.len().min(64));
                extreme(random, &mut bytes, at);
            }
            7 | 8 => bytes = number(random, &bytes),
            9 => {
                let at = random.below(bytes.len().min(64));
                flip(random, &mut bytes, at);
            }
            _ => flip(random, &mut bytes, at),
        }
    }
    bytes
}

fn flip(random: &mut Random, bytes: &mut [u8], at: usize) {
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= 1 << random.below(8);
    }
}

/// A number of 1 to 8 bytes becomes zero, one, or the largest or next to it.
fn extreme(random: &mut Random, bytes: &mut [u8], at: usize) {
    let width = *random.pick(&[1, 2, 4, 8]);
    let value = *random.pick(&[0u64, 1, u64::MAX, u64::MAX - 1, 1 << 63, 0x7fff_ffff, 0x0100_0000, 0xffff]);
    let encoded = if random.one_in(2) { value.to_le_bytes() } else { value.rotate_left(64 - 8 * width).to_be_bytes() };
    let width = (width as usize).min(bytes.len().saturating_sub(at));
    bytes[at..at + width].copy_from_slice(&encoded[..width]);
}

/// A number that stands in a text becomes another.
fn number(random: &mut Random, bytes: &[u8]) -> Vec<u8> {
    let starts: Vec<usize> = (0..bytes.len())
        .filter(|&at| bytes[at].is_ascii_digit() && (at == 0 || !bytes[at - 1].is_ascii_alphanumeric()))
        .collect();
    let Some(&start) = starts.get(random.below(starts.len())) else { return bytes.to_vec() };
    let end =
        bytes[start..].iter().position(|byte| !byte.is_ascii_digit()).map_or(bytes.len(), |length| start + length);
    [&bytes[..start], random.pick(&NUMBERS).as_bytes(), &bytes[end..]].concat()
}

/// One to three changes of what the JSON says; or of its bytes, where it is none or once in a while.
pub fn json_text(random: &mut Random, good: &[u8]) -> Vec<u8> {
    match serde_json::from_slice::<Value>(good) {
        Ok(mut value) if !random.one_in(4) => {
            (0..1 + random.below(3)).for_each(|_| json(random, &mut value));
            let text = value.to_string();
            // Where JSON holds hostile numbers, it is by their text.
            match random.one_in(4) {
                true => number(random, text.as_bytes()),
                false => text.into_bytes(),
            }
        }
        _ => bytes(random, good),
    }
}

/// Changes one place of a value, drawn on the way down.
fn json(random: &mut Random, value: &mut Value) {
    let deeper = !random.one_in(5);
    match value {
        Value::Object(fields) if deeper && !fields.is_empty() => object(random, fields),
        Value::Array(items) if deeper && !items.is_empty() => {
            let at = random.below(items.len());
            match random.below(8) {
                0 => drop(items.remove(at)),
                1 => items.insert(at, items[at].clone()),
                _ => json(random, &mut items[at]),
            }
        }
        _ => *value = hostile(random, value),
    }
}

fn object(random: &mut Random, fields: &mut Map<String, Value>) {
    let keys: Vec<String> = fields.keys().cloned().collect();
    let key = random.pick(&keys).clone();
    match random.below(10) {
        0 => drop(fields.remove(&key)),
        1 => {
            let other = fields[random.pick(&keys).as_str()].clone();
            fields.insert(key, other);
        }
        2 => {
            let moved = fields.remove(&key).unwrap_or_default();
            fields.insert(format!("{key}x"), moved);
        }
        _ => json(random, &mut fields[&key]),
    }
}

fn hostile(random: &mut Random, was: &Value) -> Value {
    let numbers = [
        json!(0),
        json!(1),
        json!(3),
        json!(-1),
        json!(0.5),
        json!(1e308),
        json!(-1e30),
        json!(65_537),
        json!(4_294_967_296u64),
        json!(u64::MAX),
        json!(i64::MIN),
    ];
    let others =
        [json!(null), json!(true), json!(""), json!("\u{0}x"), json!("x".repeat(70_000)), json!([]), json!({})];
    match was {
        Value::Number(number) if random.one_in(3) => json!(number.as_f64().unwrap_or(1.0) * 2.0 + 1.0),
        Value::Number(_) if !random.one_in(4) => random.pick(&numbers).clone(),
        Value::String(text) if random.one_in(2) => {
            json!(String::from_utf8_lossy(&bytes(random, text.as_bytes())))
        }
        Value::Bool(old) if random.one_in(2) => json!(!old),
        _ if random.one_in(8) => (0..100).fold(json!(1), |inner, _| json!([inner])),
        _ if random.one_in(2) => random.pick(&numbers).clone(),
        _ => random.pick(&others).clone(),
    }
}

/// A safetensors file whose head says something else, with a length that fits; or one with changed bytes.
pub fn safetensors(random: &mut Random, good: &[u8]) -> Vec<u8> {
    let head = good.first_chunk::<8>().map(|length| u64::from_le_bytes(*length) as usize);
    let head = head.and_then(|length| Some((good.get(8..8 + length)?, good.get(8 + length..)?)));
    match head {
        Some((head, tensors)) if !random.one_in(3) => {
            let head = json_text(random, head);
            [&(head.len() as u64).to_le_bytes()[..], &head, tensors].concat()
        }
        // Weights that are no numbers.
        Some((head, tensors)) if random.one_in(2) => {
            let mut tensors = tensors.to_vec();
            let at = random.below(tensors.len()) / 4 * 4;
            let value = *random.pick(&[f32::NAN, f32::INFINITY, f32::MAX, -0.0]);
            tensors[at..].iter_mut().zip(value.to_le_bytes()).for_each(|(byte, new)| *byte = new);
            [&(head.len() as u64).to_le_bytes()[..], head, &tensors].concat()
        }
        _ => bytes(random, good),
    }
}

/// A PNG file with a changed chunk whose checksum fits, so that what reads chunks has to find it; or with changed bytes.
pub fn png(random: &mut Random, good: &[u8]) -> Vec<u8> {
    let mut chunks = Vec::new();
    let mut at = 8;
    while let Some(length) = good.get(at..at + 4).and_then(|bytes| bytes.first_chunk::<4>()) {
        let length = u32::from_be_bytes(*length) as usize;
        let Some(chunk) = good.get(at + 4..at + 8 + length) else { break };
        chunks.push(chunk.to_vec());
        at += 12 + length;
    }
    if chunks.is_empty() || random.one_in(3) {
        return bytes(random, good);
    }
    let which = random.below(chunks.len());
    match random.below(6) {
        0 => drop(chunks.remove(which)),
        1 => chunks.insert(which, chunks[which].clone()),
        2 => {
            let to = random.below(chunks.len());
            chunks.swap(which, to);
        }
        _ => {
            let (kind, content) = chunks[which].split_at(4);
            chunks[which] = [kind, &bytes(random, content)].concat();
        }
    }
    let mut png = good[..8].to_vec();
    for chunk in chunks {
        let mut sum = flate2::Crc::new();
        sum.update(&chunk);
        png.extend((chunk.len() as u32 - 4).to_be_bytes());
        png.extend(&chunk);
        png.extend(sum.sum().to_be_bytes());
    }
    png
}

/// Pieces of templates that ask for more than there is: depth, time, memory.
fn greedy(random: &mut Random) -> String {
    let n = 10usize.pow(1 + random.below(5) as u32);
    match random.below(12) {
        0 => format!("{{{{ 1{} }}}}", "+1".repeat(n)),
        1 => format!("{{{{ {}1 }}}}", "not ".repeat(n)),
        2 => format!("{{{{ {}1{} }}}}", "(".repeat(n), ")".repeat(n)),
        3 => format!("{{{{ {}1{} }}}}", "[".repeat(n), "]".repeat(n)),
        4 => format!("{}x{}", "{% if 1 %}".repeat(n), "{% endif %}".repeat(n)),
        5 => format!("{}x{}", "{% for i in range(10000) %}".repeat(1 + n % 7), "{% endfor %}".repeat(1 + n % 7)),
        6 => format!("{{{{ '{{:>{n}0000}}'.format('a') }}}}"),
        7 => format!("{{{{ 'x' * {n}000000 }}}}"),
        8 => format!("{{% for i in range({n}00000000) %}}{{% endfor %}}"),
        9 => "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}".into(),
        10 => {
            "{% set ns = namespace(t='xx') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}"
                .into()
        }
        _ => format!("{{{{ messages{} }}}}", "[0]".repeat(n)),
    }
}

/// A template with changed bytes, or with a piece that asks for too much.
pub fn template(random: &mut Random, good: &[u8]) -> Vec<u8> {
    match random.one_in(3) {
        true => [greedy(random).as_bytes(), good].concat(),
        false => bytes(random, good),
    }
}

/// A packed file that says it holds two gigabytes more, of zeros, in a megabyte or two.
fn bomb(good: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Each piece ends at a byte and refers to nothing before it, so that it can be repeated.
    let mut encoder = flate2::Compress::new(flate2::Compression::fast(), false);
    let (zeros, mut piece) = (vec![0; 1 << 20], Vec::with_capacity(1 << 16));
    let _ = encoder.compress_vec(&zeros, &mut piece, flate2::FlushCompress::Full);
    let mut content = Vec::new();
    let _ = std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(good), &mut content);
    let mut head = Vec::with_capacity(content.len() + 1024);
    let _ = flate2::Compress::new(flate2::Compression::fast(), false).compress_vec(
        &content,
        &mut head,
        flate2::FlushCompress::Full,
    );
    bytes.extend([0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255]);
    bytes.extend(&head);
    (0..2048).for_each(|_| bytes.extend(&piece));
    bytes.extend([3, 0]);
    bytes
}

/// A packed file whose content is changed, or whose own bytes are; or one that unpacks to more than there is memory.
pub fn gzip(random: &mut Random, good: &[u8]) -> Vec<u8> {
    if random.one_in(12) {
        return bomb(good);
    }
    let mut content = Vec::new();
    let read = std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(good), &mut content);
    match read.is_ok() && random.one_in(2) {
        true => crate::specimens::packed(&bytes(random, &content)),
        false => bytes(random, good),
    }
}

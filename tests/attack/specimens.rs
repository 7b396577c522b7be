//! Small good files of every kind that is read, made here, each with a recipe or a command that reads it.

use std::collections::BTreeMap;
use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;

/// Files by name.
pub type Tree = BTreeMap<String, Vec<u8>>;

/// Files and a command that reads them.
pub struct Specimen {
    pub name: &'static str,
    /// All that the command needs, the recipe among it.
    pub tree: Tree,
    /// Beginnings of the names of files that are made hostile.
    pub targets: Vec<&'static str>,
    pub commands: Vec<Vec<&'static str>>,
}

const PREVIEW: &[&str] = &["preview", "recipe.toml", "--rows", "1"];
const TRAIN: &[&str] = &["train", "recipe.toml", "--out", "run"];

const VISION: &str = r#"
[model.classifier.vision_transformer]
patch_size = 4
d_model = 16
n_layers = 1
[model.classifier.vision_transformer.attention.softmax]
n_heads = 2
[training]
steps = 1
batch_size = 4
[validation]
batches = 1
fraction = 0.3
"#;

const DECODER: &str = r#"
[model.decoder]
d_model = 16
n_layers = 1
[model.decoder.attention.softmax]
n_heads = 2
[training]
steps = 1
seq_len = 192
batch_size = 2
[validation]
batches = 1
fraction = 0.3
"#;

const TEXT_ENCODER: &str = r#"
[model.classifier.text_encoder]
d_model = 16
n_layers = 1
[model.classifier.text_encoder.attention.softmax]
n_heads = 2
[training]
steps = 1
seq_len = 16
batch_size = 4
[validation]
batches = 1
fraction = 0.3
"#;

const GAUSSIAN: &str = r#"
[model.classifier.gaussian_adaptive_transformer]
d_conv = 8
[model.classifier.gaussian_adaptive_transformer.mixer.gaussian_adaptive]
gates = [{ paper = { n_heads = 1 } }]
[training]
steps = 1
batch_size = 4
[validation]
batches = 1
fraction = 0.3
"#;

const EMBEDDER: &str = r#"
[model.embedder]
pooling.mltp = { input = "last_of_each_layer", n_heads = 2, n_latents = 2 }
[training]
steps = 1
batch_size = 4
[validation]
batches = 1
fraction = 0.3
"#;

/// All of them but those that need a trained model.
pub fn all() -> Vec<Specimen> {
    [pictures(), tables(), sounds(), texts(), arrays()].into_iter().flatten().collect()
}

fn specimen(name: &'static str, recipe: &str, data: &str, targets: &[&'static str], tree: Tree) -> Specimen {
    let mut tree = tree;
    tree.insert("recipe.toml".into(), format!("{data}\n{recipe}").into_bytes());
    let commands = vec![PREVIEW.to_vec(), TRAIN.to_vec()];
    Specimen { name, tree, targets: targets.to_vec(), commands }
}

fn pictures() -> Vec<Specimen> {
    let folder = "[data.image_folder]\npath = \"d\"\nsize = [8, 8]\n";
    let (mut pngs, mut jpegs) = (Tree::new(), Tree::new());
    for i in 0..8u8 {
        pngs.insert(format!("d/{}/{i}.png", i % 2), png(i));
        jpegs.insert(format!("d/{}/{i}.jpg", i % 2), jpeg(i));
    }
    vec![specimen("png", VISION, folder, &["d/"], pngs), specimen("jpeg", VISION, folder, &["d/"], jpegs)]
}

/// A small picture: grey, colours, with transparency, or of a palette, by its number.
fn png(number: u8) -> Vec<u8> {
    let kinds = [png::ColorType::Grayscale, png::ColorType::Rgb, png::ColorType::Rgba, png::ColorType::Indexed];
    let kind = kinds[usize::from(number / 2) % 4];
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, 9, 10);
    encoder.set_color(kind);
    encoder.set_depth(png::BitDepth::Eight);
    if kind == png::ColorType::Indexed {
        encoder.set_palette((0..48).collect::<Vec<u8>>());
        encoder.set_trns((0..16).map(|alpha| alpha * 16).collect::<Vec<u8>>());
    }
    let pixels: Vec<u8> = (0..90 * kind.samples() as u32).map(|i| (i * 7 + u32::from(number)) as u8 % 16).collect();
    // Writing into memory does not fail.
    if let Ok(mut writer) = encoder.write_header() {
        let _ = writer.write_image_data(&pixels);
        let _ = writer.finish();
    }
    bytes
}

/// A grey picture of 16 x 16 pixels in baseline JPEG: four blocks, of each only its mean.
fn jpeg(number: u8) -> Vec<u8> {
    let mut bytes = vec![0xff, 0xd8];
    let mut segment = |marker: u8, content: &[u8]| {
        bytes.extend([0xff, marker]);
        bytes.extend((content.len() as u16 + 2).to_be_bytes());
        bytes.extend(content);
    };
    segment(0xe0, b"JFIF\0\x01\x01\0\0\x01\0\x01\0\0");
    // Quantisation by 8 throughout.
    segment(0xdb, &[&[0u8][..], &[8; 64]].concat());
    segment(0xc0, &[8, 0, 16, 0, 16, 1, 1, 0x11, 0]);
    // Sizes of means 0 to 7 in codes of 4 bits; of what follows only "end of block", in a code of 1 bit.
    segment(0xc4, &[&[0x00, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0][..], &[0, 1, 2, 3, 4, 5, 6, 7]].concat());
    segment(0xc4, &[0x10, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    segment(0xda, &[1, 1, 0, 0, 63, 0]);
    let mut bits = String::new();
    for difference in [u32::from(number) * 8 + 1, 17, 5, 40] {
        let size = 32 - difference.leading_zeros();
        bits += &format!("{size:04b}{difference:0width$b}0", width = size as usize);
    }
    while !bits.len().is_multiple_of(8) {
        bits.push('1');
    }
    for byte in bits.as_bytes().chunks(8) {
        let byte = byte.iter().fold(0u8, |sum, bit| sum << 1 | (bit - b'0'));
        bytes.push(byte);
        // A byte of ones is followed by zeros, so that it is no marker.
        bytes.extend((byte == 0xff).then_some(0));
    }
    bytes.extend([0xff, 0xd9]);
    bytes
}

fn tables() -> Vec<Specimen> {
    let row = |i: usize| (0..65).map(|j| if j == 64 { i % 2 } else { (i * j) % 256 }.to_string()).collect::<Vec<_>>();
    let csv = (0..12).map(|i| row(i).join(",") + "\n").collect::<String>().into_bytes();
    let idx = |sizes: &[u32], values: Vec<u8>| {
        let head = [&[0, 0, 8, sizes.len() as u8][..], &sizes.iter().flat_map(|n| n.to_be_bytes()).collect::<Vec<_>>()];
        [head.concat(), values].concat()
    };
    let images = idx(&[12, 8, 8], (0..12 * 64).map(|i| i as u8).collect());
    let labels = idx(&[12], (0..12).map(|i| i % 2).collect());
    let cifar =
        (0..8u8).flat_map(|i| std::iter::once(i % 2).chain((0..3072).map(move |j| (j % 251) as u8 ^ i))).collect();
    let idx_data = |images: &str, labels: &str| format!("[data.idx]\nimages = \"{images}\"\nlabels = \"{labels}\"\n");
    let csv_data = |path: &str| format!("[data.csv_images]\npaths = [\"{path}\"]\nsize = [8, 8]\n");
    let tree =
        |files: &[(&str, Vec<u8>)]| files.iter().map(|(name, bytes)| (name.to_string(), bytes.clone())).collect();
    vec![
        specimen("csv", VISION, &csv_data("t.csv"), &["t.csv"], tree(&[("t.csv", csv.clone())])),
        specimen("csv.gz", VISION, &csv_data("t.csv.gz"), &["t.csv.gz"], tree(&[("t.csv.gz", packed(&csv))])),
        specimen(
            "idx",
            VISION,
            &idx_data("i", "l"),
            &["i", "l"],
            tree(&[("i", images.clone()), ("l", labels.clone())]),
        ),
        specimen(
            "idx.gz",
            VISION,
            &idx_data("i.gz", "l.gz"),
            &["i.gz", "l.gz"],
            tree(&[("i.gz", packed(&images)), ("l.gz", packed(&labels))]),
        ),
        specimen("cifar", VISION, "[data.cifar]\npaths = [\"c.bin\"]\n", &["c.bin"], tree(&[("c.bin", cifar)])),
    ]
}

/// A packed file.
pub fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    // Writing into memory does not fail.
    let _ = encoder.write_all(bytes);
    encoder.finish().unwrap_or_default()
}

fn sounds() -> Vec<Specimen> {
    let data = "[data.wav_folder]\npath = \"d\"\nsample_rate = 8000\n[data.wav_folder.log_mel]\nn_fft = 64\nhop = 32\n\
                n_mels = 8\nn_frames = 8\n";
    let tree = (0..8u8).map(|i| (format!("d/{}/{i}.wav", i % 2), wav(i))).collect();
    vec![specimen("wav", VISION, data, &["d/"], tree)]
}

/// A short sound, by its number of whole numbers of 1 to 3 bytes or of floats, in one or two channels.
fn wav(number: u8) -> Vec<u8> {
    let (format, bits) = [(1u16, 16u16), (1, 8), (1, 24), (3, 32)][usize::from(number / 2) % 4];
    let channels = 1 + u16::from(number) % 2;
    let width = bits / 8 * channels;
    let sample = |i: u32| match format {
        3 => (f64::from(i).sin() as f32).to_le_bytes().to_vec(),
        _ => (i.wrapping_mul(2_654_435_761) as i32).to_le_bytes()[..usize::from(bits / 8)].to_vec(),
    };
    let samples: Vec<u8> = (0..300 * u32::from(channels)).flat_map(sample).collect();
    let mut bytes = b"RIFF".to_vec();
    bytes.extend((36 + samples.len() as u32).to_le_bytes());
    bytes.extend(b"WAVEfmt \x10\0\0\0");
    bytes.extend(format.to_le_bytes());
    bytes.extend(channels.to_le_bytes());
    bytes.extend(8000u32.to_le_bytes());
    bytes.extend((8000 * u32::from(width)).to_le_bytes());
    bytes.extend(width.to_le_bytes());
    bytes.extend(bits.to_le_bytes());
    bytes.extend(b"data");
    bytes.extend((samples.len() as u32).to_le_bytes());
    bytes.extend(samples);
    bytes
}

/// A template with what templates are made of.
pub const TEMPLATE: &str = "{%- set ns = namespace(found=false) -%}{%- macro turn(role, text) -%}<|{{ role }}|>\
{{ text | trim }}{{ '\\n' }}{%- endmacro -%}{%- for message in messages -%}{%- if message['role'] == 'system' and loop.first -%}\
{{ turn('system', message.content) }}{%- elif message.role in ['user', 'assistant'] -%}{{ turn(message.role, message['content']) }}\
{%- set ns.found = true -%}{%- else -%}{{ raise_exception('unknown role') }}{%- endif -%}{%- endfor -%}\
{%- if tools is defined and tools %}{{ tools | tojson(indent=2) }}{% endif -%}\
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}";

fn texts() -> Vec<Specimen> {
    let rows = |row: &dyn Fn(usize) -> String| (0..60).map(row).collect::<String>().into_bytes();
    let chat = rows(&|i| {
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"{i} + 1\"}}, {{\"role\": \"assistant\", \"content\": \"{}\"}}]}}\n",
            i + 1
        )
    });
    let text = rows(&|i| format!("{{\"text\": \"the cat {i} sat on the mat and was glad for a while\"}}\n"));
    let labelled = rows(&|i| format!("{{\"text\": \"the cat is {i}\", \"label\": \"{}\"}}\n", i % 2));
    let html = rows(&|i| {
        format!("<html><body><p class=\"x\">the cat &amp; the <b>mat</b> {i}</p><pre>a &lt; b</pre></body>\n")
    });
    let chat_data = "[data.chat]\npaths = [\"c.jsonl\"]\ntoo_long = \"drop\"\n";
    let one = |name: &str, bytes: Vec<u8>| Tree::from([(name.to_owned(), bytes)]);
    let mut template = one("c.jsonl", chat.clone());
    template.insert("t.jinja".into(), TEMPLATE.into());
    vec![
        specimen("chat", DECODER, &format!("{chat_data}template = \"chatml\"\n"), &["c.jsonl"], one("c.jsonl", chat)),
        specimen("template", DECODER, &format!("{chat_data}template = \"t.jinja\"\n"), &["t.jinja"], template),
        specimen("jsonl", DECODER, "[data.jsonl]\npaths = [\"t.jsonl\"]\n", &["t.jsonl"], one("t.jsonl", text.clone())),
        specimen(
            "text",
            DECODER,
            "[data.text]\npaths = [\"t.txt\"]\nsyntax = \"any\"\n",
            &["t.txt"],
            one("t.txt", text),
        ),
        specimen("html", DECODER, "[data.text]\npaths = [\"t.html\"]\n", &["t.html"], one("t.html", html)),
        specimen(
            "labelled",
            TEXT_ENCODER,
            "[data.labelled_text]\npaths = [\"l.jsonl\"]\n",
            &["l.jsonl"],
            one("l.jsonl", labelled),
        ),
    ]
}

fn arrays() -> Vec<Specimen> {
    let floats = |n: usize| (0..n).flat_map(|i| ((i % 17) as f32 / 17.0).to_le_bytes()).collect::<Vec<u8>>();
    let labels = |n: usize| (0..n).flat_map(|i| (i as i64 % 2).to_le_bytes()).collect::<Vec<u8>>();
    let tensors = |head: &str, parts: &[Vec<u8>]| {
        [&(head.len() as u64).to_le_bytes()[..], head.as_bytes(), &parts.concat()].concat()
    };
    let features = tensors(
        r#"{"features":{"dtype":"F32","shape":[12,3,4],"data_offsets":[0,576]},"labels":{"dtype":"I64","shape":[12],"data_offsets":[576,672]}}"#,
        &[floats(144), labels(12)],
    );
    let pairs = tensors(r#"{"features":{"dtype":"F32","shape":[12,2,3,4],"data_offsets":[0,1152]}}"#, &[floats(288)]);
    let npy = |kind: &str, shape: &str, values: Vec<u8>| {
        let head = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': ({shape}), }}");
        let head = format!("{head:<117}\n");
        [b"\x93NUMPY\x01\0", &(head.len() as u16).to_le_bytes()[..], head.as_bytes(), &values].concat()
    };
    let arrays = Tree::from([
        ("f.npy".to_owned(), npy("<f4", "12, 3, 4", floats(144))),
        ("l.npy".to_owned(), npy("<i8", "12,", labels(12))),
    ]);
    let one = |name: &str, bytes: Vec<u8>| Tree::from([(name.to_owned(), bytes)]);
    let mut all = vec![
        specimen(
            "npy",
            GAUSSIAN,
            "[data.features]\npaths = [\"f.npy\"]\nlabels = [\"l.npy\"]\n",
            &["f.npy", "l.npy"],
            arrays,
        ),
        specimen(
            "features",
            GAUSSIAN,
            "[data.features]\npaths = [\"f.safetensors\"]\n",
            &["f.safetensors"],
            one("f.safetensors", features),
        ),
        specimen(
            "pairs",
            EMBEDDER,
            "[data.feature_pairs]\npaths = [\"p.safetensors\"]\n",
            &["p.safetensors"],
            one("p.safetensors", pairs),
        ),
    ];
    // There is nothing to look at in features.
    all.iter_mut().for_each(|specimen| specimen.commands = vec![TRAIN.to_vec()]);
    all
}

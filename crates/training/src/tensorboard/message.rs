//! The messages of an event file as protocol-buffer bytes, encoded by hand.
//!
//! Field numbers are those of `event.proto`, `summary.proto`, `histogram.proto` and `tensor.proto`
//! in TensorFlow; each function names the message that it writes.

use serde_json::Value as Json;

use super::histogram::Histogram;

/// `Event { wall_time, file_version }`: the first record of every file.
pub(super) fn file_version(wall_time: f64) -> Vec<u8> {
    let mut event = event(wall_time, 0);
    event.bytes(3, b"brain.Event:2");
    event.0
}

/// `Event { wall_time, step, session_log: SessionLog { status: START } }`: readers forget the events
/// of steps from `step` on that they have seen so far.
pub(super) fn session_start(wall_time: f64, step: u64) -> Vec<u8> {
    let mut session = Message::default();
    session.varint(1, 1);
    let mut event = event(wall_time, step);
    event.bytes(7, &session.0);
    event.0
}

/// `Event { wall_time, step, summary: Summary { value: [Value { tag, .. }] } }`.
pub(super) fn summary(wall_time: f64, step: u64, tag: &str, value: Value) -> Vec<u8> {
    let mut tagged = Message::default();
    tagged.bytes(1, tag.as_bytes());
    tagged.0.extend_from_slice(&value.0.0);
    let mut summary = Message::default();
    summary.bytes(1, &tagged.0);
    let mut event = event(wall_time, step);
    event.bytes(5, &summary.0);
    event.0
}

fn event(wall_time: f64, step: u64) -> Message {
    let mut event = Message::default();
    event.double(1, wall_time);
    event.varint(2, step);
    event
}

/// A `Summary.Value` that has no tag yet.
pub(super) struct Value(Message);

impl Value {
    /// `metadata { summary_description }`, for values without metadata.
    pub(super) fn described(mut self, about: &str) -> Self {
        let mut metadata = Message::default();
        metadata.bytes(3, about.as_bytes());
        self.0.bytes(9, &metadata.0);
        self
    }
}

/// `Summary.Value { simple_value }`.
pub(super) fn scalar(value: f32) -> Value {
    let mut message = Message::default();
    message.float(2, value);
    Value(message)
}

/// `Summary.Value { histo: HistogramProto }`.
pub(super) fn histogram(histogram: &Histogram) -> Value {
    let mut proto = Message::default();
    proto.double(1, histogram.min);
    proto.double(2, histogram.max);
    proto.double(3, histogram.num);
    proto.double(4, histogram.sum);
    proto.double(5, histogram.sum_squares);
    proto.doubles(6, &histogram.limits);
    proto.doubles(7, &histogram.counts);
    let mut message = Message::default();
    message.bytes(5, &proto.0);
    Value(message)
}

/// `Summary.Value { image: Image { height, width, colorspace, encoded_image_string } }`.
pub(super) fn image(width: u32, height: u32, png: &[u8]) -> Value {
    let mut image = Message::default();
    image.varint(1, u64::from(height));
    image.varint(2, u64::from(width));
    image.varint(3, 3); // RGB
    image.bytes(4, png);
    let mut message = Message::default();
    message.bytes(4, &image.0);
    Value(message)
}

/// `Summary.Value { tensor: TensorProto of one string, metadata: plugin "text" }`.
pub(super) fn text(markdown: &str) -> Value {
    let mut plugin = Message::default();
    plugin.bytes(1, b"text");
    let mut metadata = Message::default();
    metadata.bytes(1, &plugin.0);
    metadata.varint(4, 2); // DATA_CLASS_TENSOR
    let mut dimension = Message::default();
    dimension.varint(1, 1);
    let mut shape = Message::default();
    shape.bytes(2, &dimension.0);
    let mut tensor = Message::default();
    tensor.varint(1, 7); // DT_STRING
    tensor.bytes(2, &shape.0);
    tensor.bytes(8, markdown.as_bytes());
    let mut message = Message::default();
    message.bytes(8, &tensor.0);
    message.bytes(9, &metadata.0);
    Value(message)
}

/// The tag of [`hyperparameters`].
pub(super) const SESSION_START_TAG: &str = "_hparams_/session_start_info";

/// `Summary.Value { metadata: plugin "hparams" with HParamsPluginData { session_start_info: SessionStartInfo { hparams,
/// start_time_secs } } }`, as `tensorboard/plugins/hparams/plugin_data.proto` defines it.
pub(super) fn hyperparameters(values: &[(String, Json)], wall_time: f64) -> Value {
    let mut info = Message::default();
    for (name, value) in values {
        // google.protobuf.Value
        let mut proto = Message::default();
        match value {
            Json::Bool(value) => proto.varint(4, u64::from(*value)),
            Json::Number(number) => proto.double(2, number.as_f64().unwrap_or(f64::NAN)),
            Json::String(text) => proto.bytes(3, text.as_bytes()),
            other => proto.bytes(3, other.to_string().as_bytes()),
        }
        let mut entry = Message::default();
        entry.bytes(1, name.as_bytes());
        entry.bytes(2, &proto.0);
        info.bytes(1, &entry.0);
    }
    info.double(5, wall_time);
    let mut data = Message::default();
    data.bytes(3, &info.0);
    let mut plugin = Message::default();
    plugin.bytes(1, b"hparams");
    plugin.bytes(2, &data.0);
    let mut metadata = Message::default();
    metadata.bytes(1, &plugin.0);
    let mut message = Message::default();
    message.bytes(9, &metadata.0);
    Value(message)
}

/// The fields of one message, in the order in which they were added.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn key(&mut self, field: u64, wire_type: u64) {
        self.raw_varint(field << 3 | wire_type);
    }

    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(&mut self, field: u64, value: u64) {
        self.key(field, 0);
        self.raw_varint(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.key(field, 1);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn float(&mut self, field: u64, value: f32) {
        self.key(field, 5);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.key(field, 2);
        self.raw_varint(value.len() as u64);
        self.0.extend_from_slice(value);
    }

    fn doubles(&mut self, field: u64, values: &[f64]) {
        let packed: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.bytes(field, &packed);
    }
}

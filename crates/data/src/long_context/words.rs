//! The words of generated texts: few and common, so that small vocabularies hold each as one token.

/// Things; also what codes are made of.
pub(super) const THINGS: [&str; 64] = [
    "apple", "arrow", "badge", "ball", "basket", "bell", "boat", "book", "bottle", "bowl", "box", "bread", "bridge",
    "brush", "button", "cake", "candle", "card", "chair", "clock", "cloud", "coat", "coin", "cup", "desk", "door",
    "drum", "flag", "flower", "fork", "glass", "glove", "hammer", "hat", "horn", "key", "kite", "knife", "ladder",
    "lamp", "leaf", "letter", "map", "mirror", "needle", "paper", "pen", "piano", "plate", "ring", "rope", "scarf",
    "ship", "shoe", "spoon", "stone", "table", "tent", "train", "tree", "wheel", "whistle", "window", "wire",
];

/// Colours, which codes are, so that no code is a thing.
pub(super) const CODES: [&str; 32] = [
    "amber", "azure", "beige", "black", "blue", "bronze", "brown", "coral", "cream", "crimson", "gold", "gray",
    "green", "indigo", "ivory", "jade", "lemon", "lilac", "lime", "mint", "navy", "olive", "orange", "pink", "plum",
    "purple", "red", "ruby", "silver", "violet", "white", "yellow",
];

/// People.
pub(super) const PEOPLE: [&str; 16] = [
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo", "Mary", "Nina",
    "Oscar", "Paul",
];

/// Places.
pub(super) const PLACES: [&str; 16] = [
    "attic", "barn", "cellar", "forest", "garage", "garden", "hall", "harbor", "kitchen", "library", "market",
    "museum", "office", "park", "school", "station",
];

/// Names of variables.
pub(super) const LETTERS: [&str; 26] = [
    "A", "B", "C", "D", "E", "F", "G", "H", "I", "J", "K", "L", "M", "N", "O", "P", "Q", "R", "S", "T", "U", "V", "W",
    "X", "Y", "Z",
];

const QUALITIES: [&str; 12] =
    ["old", "new", "small", "large", "heavy", "light", "round", "long", "short", "clean", "broken", "quiet"];

const NOUNS: [&str; 12] =
    ["river", "mountain", "road", "field", "house", "wall", "roof", "wind", "rain", "snow", "morning", "evening"];

const VERBS: [&str; 8] = ["was", "seemed", "looked", "became", "stayed", "felt", "remained", "grew"];

/// A sentence that says nothing.
pub(super) fn filler(mut draw: impl FnMut(usize) -> usize) -> String {
    let (noun, verb) = (NOUNS[draw(NOUNS.len())], VERBS[draw(VERBS.len())]);
    format!("The {noun} {verb} {}.", QUALITIES[draw(QUALITIES.len())])
}

//! The figures of a report: SVG whose colours are the page's, so that they are legible on light and on dark ground.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Stands for the page's ink until the figure is done.
const INK: RGBColor = RGBColor(1, 2, 3);
/// Stands for faint lines.
const FAINT: RGBColor = RGBColor(4, 5, 6);
/// How many colours the page has for arms; further arms use them again, with other marks.
pub const COLOURS: usize = 7;
/// Width and height of a figure, in pixels: its text is readable where a column, or a phone's screen, is as wide as that.
pub const SIZE: (u32, u32) = (400, 270);
/// That of a small figure.
pub const SMALL: (u32, u32) = (270, 190);
/// That of a figure that takes the whole width of the page.
pub const WIDE: (u32, u32) = (860, 400);
/// Between the lines of labels, in pixels.
const LINE: i32 = 15;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Axis, Axis>>;

/// An axis over numbers with ticks of ours.
struct Axis {
    ends: (f64, f64),
    ticks: Vec<f64>,
}

impl Axis {
    /// With round numbers, about so many.
    fn numbers(ends: (f64, f64), most: usize) -> Self {
        Self { ends, ticks: round_numbers(ends.0, ends.1, most) }
    }
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (first, last): (i32, i32)) -> i32 {
        let (low, high) = self.ends;
        let share = (value - low) / (high - low);
        first + (f64::from(last - first) * share).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.ends.0..self.ends.1
    }
}

/// Stands for the colour of an arm.
fn colour(arm: usize) -> RGBColor {
    RGBColor(7, 8, (arm % COLOURS) as u8)
}

/// One point of a curve: a mean, and what is around it.
#[derive(Debug, Clone, Copy)]
pub struct At {
    /// Where it stands.
    pub x: f64,
    /// The mean.
    pub y: f64,
    /// The lower end of the band.
    pub low: f64,
    /// The upper end of the band.
    pub high: f64,
}

impl At {
    /// A mean over seeds with a standard deviation to both sides; 0 for one seed.
    pub fn around(x: f64, y: f64, deviation: f64) -> Self {
        Self { x, y, low: y - deviation, high: y + deviation }
    }
}

/// A curve of an arm.
pub struct Curve {
    /// Which arm.
    pub arm: usize,
    /// Its points, from left to right.
    pub points: Vec<At>,
    /// How they are drawn.
    pub drawn: Drawn,
}

/// How the points of a curve are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Drawn {
    /// Marks with lines between them.
    #[default]
    Joined,
    /// Marks alone.
    Marks,
    /// Lines alone.
    Line,
}

impl Curve {
    /// Marks with lines between them.
    pub fn joined(arm: usize, points: Vec<At>) -> Self {
        Self { arm, points, drawn: Drawn::Joined }
    }
}

/// Curves with bands.
pub struct Curves<'a> {
    /// What the figure shows, for people who cannot see it.
    pub title: &'a str,
    /// Under the horizontal axis.
    pub x: &'a str,
    /// Beside the vertical axis; may be empty.
    pub y: &'a str,
    /// The curves.
    pub curves: Vec<Curve>,
    /// Whether the steep beginning (the first tenth) may be cut off.
    pub cut: bool,
    /// Whether points are given by their decimal logarithms: the axes tell the numbers.
    pub logarithms: bool,
    /// What stands at 0, 1, 2 and so on along the horizontal axis, instead of numbers.
    pub names: &'a [&'a str],
    /// Width and height in pixels.
    pub size: (u32, u32),
}

impl<'a> Curves<'a> {
    /// Curves over numbers, with everything else as most figures have it.
    pub fn of(title: &'a str, x: &'a str, y: &'a str, curves: Vec<Curve>) -> Self {
        Self { title, x, y, curves, cut: false, logarithms: false, names: &[], size: SIZE }
    }
}

/// A row of a dot plot.
pub struct Row {
    /// Which arm.
    pub arm: usize,
    /// Its name.
    pub name: String,
    /// Every value.
    pub values: Vec<f64>,
    /// Their mean.
    pub mean: f64,
    /// Half the interval's width, where there is one.
    pub margin: Option<f64>,
}

/// A named point.
pub struct Dot {
    /// Which arm.
    pub arm: usize,
    /// Its name.
    pub name: String,
    /// Where it stands.
    pub at: At,
}

/// Draws curves with bands. `None` where there is nothing to draw.
///
/// # Errors
/// If drawing fails.
pub fn curves(figure: &Curves<'_>) -> Result<Option<String>, String> {
    let points = || figure.curves.iter().flat_map(|curve| &curve.points);
    let (left, right) = match (figure.logarithms, padded(points().map(|at| at.x))) {
        (true, Some(ends)) => ends,
        _ => (0.0, points().map(|at| at.x).fold(1e-9, f64::max)),
    };
    let counted = points().filter(|at| !figure.cut || at.x >= 0.1 * right);
    let Some(range) = padded(counted.flat_map(|at| [at.low, at.high])) else { return Ok(None) };
    let drawn = draw(figure.title, figure.size, |area| {
        let format = decimals(range.1 - range.0);
        let round = if figure.logarithms { round_logarithms } else { round_numbers };
        let across = match figure.names {
            [] => round(left, right, figure.size.0 as usize / 80),
            names => (0..names.len()).map(|at| at as f64).collect(),
        };
        let up = round(range.0, range.1, 6);
        let (across, up) = (Axis { ends: (left, right), ticks: across }, Axis { ends: range, ticks: up });
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            // Half of the last name stands there.
            .margin_right(if figure.names.is_empty() { 18 } else { 64 })
            .x_label_area_size(42)
            .y_label_area_size(if figure.y.is_empty() { 48 } else { 64 })
            .build_cartesian_2d(across, up)
            .map_err(said)?;
        let name = |x: &f64| match figure.names.get(*x as usize) {
            Some(name) => (*name).to_owned(),
            None if figure.logarithms => significant(10f64.powf(*x)),
            None => short(*x, right),
        };
        let value = |y: &f64| if figure.logarithms { significant(10f64.powf(*y)) } else { label(*y, format) };
        mesh(&mut chart, (figure.x, figure.y), &name, &value)?;
        let pixel = |x: f64, y: f64| chart.backend_coord(&(x, y.clamp(range.0, range.1)));
        for curve in &figure.curves {
            let colour = colour(curve.arm);
            let above = curve.points.iter().map(|at| pixel(at.x, at.high));
            let below = curve.points.iter().rev().map(|at| pixel(at.x, at.low));
            if curve.points.len() > 1 && curve.points.iter().any(|at| at.high > at.low) {
                area.draw(&Polygon::new(above.chain(below).collect::<Vec<_>>(), colour.mix(0.16))).map_err(said)?;
            }
        }
        for curve in &figure.curves {
            let style = colour(curve.arm).stroke_width(2);
            for pair in curve.points.windows(2).filter(|_| curve.drawn != Drawn::Marks) {
                if let Some((from, to)) = inside(pair[0], pair[1], range.1) {
                    let line = vec![pixel(from.0, from.1), pixel(to.0, to.1)];
                    area.draw(&PathElement::new(line, style)).map_err(said)?;
                }
            }
            for at in curve.points.iter().filter(|at| at.y <= range.1 && curve.drawn != Drawn::Line) {
                mark(area, pixel(at.x, at.y), curve.arm)?;
            }
        }
        Ok(())
    })?;
    Ok(Some(drawn))
}

/// Draws a row per arm: every value, the mean, and its interval. `zero` draws a line there: no difference.
///
/// # Errors
/// If drawing fails.
pub fn dot_plot(title: &str, x: &str, rows: &[Row], zero: bool) -> Result<Option<String>, String> {
    let ends = rows.iter().flat_map(|row| {
        let margin = row.margin.unwrap_or(0.0);
        row.values.iter().copied().chain([row.mean - margin, row.mean + margin])
    });
    let Some(range) = padded(ends.chain(zero.then_some(0.0))) else { return Ok(None) };
    let height = 70 + 50 * rows.len() as u32;
    let drawn = draw(title, (SIZE.0, height), |area| {
        let format = decimals(range.1 - range.0);
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .margin_right(24)
            .x_label_area_size(42)
            .y_label_area_size(12)
            .build_cartesian_2d(Axis::numbers(range, 5), Axis { ends: (0.0, rows.len() as f64), ticks: Vec::new() })
            .map_err(said)?;
        mesh(&mut chart, (x, ""), &|x| label(*x, format), &|_| String::new())?;
        if zero {
            let ends = [0.0, rows.len() as f64].map(|y| chart.backend_coord(&(0.0, y)));
            area.draw(&PathElement::new(ends.to_vec(), INK.stroke_width(2))).map_err(said)?;
        }
        for (at, row) in rows.iter().enumerate() {
            let y = rows.len() as f64 - at as f64 - 0.5;
            let pixel = |x: f64| chart.backend_coord(&(x, y));
            let (left, colour) = (chart.backend_coord(&(range.0, y)), colour(row.arm));
            // The name has a line of its own, so that it takes no room from the dots.
            text(area, &row.name, (left.0 + 4, left.1 - 16), HPos::Left)?;
            if let Some(margin) = row.margin {
                let ends = [row.mean - margin, row.mean + margin].map(pixel);
                area.draw(&PathElement::new(ends.to_vec(), colour.stroke_width(3))).map_err(said)?;
                for (x, y) in ends {
                    let cap = vec![(x, y - 6), (x, y + 6)];
                    area.draw(&PathElement::new(cap, colour.stroke_width(3))).map_err(said)?;
                }
            }
            for &value in &row.values {
                let (x, y) = pixel(value);
                area.draw(&Circle::new((x, y + 12), 3, colour.stroke_width(1))).map_err(said)?;
            }
            mark(area, pixel(row.mean), row.arm)?;
        }
        Ok(())
    })?;
    Ok(Some(drawn))
}

/// Draws a named point per arm, with a bar of one standard deviation.
///
/// # Errors
/// If drawing fails.
pub fn scatter(title: &str, x: &str, y: &str, dots: &[Dot]) -> Result<Option<String>, String> {
    let ys = dots.iter().flat_map(|dot| [dot.at.low, dot.at.high]);
    let (Some(ys), Some(xs)) = (padded(ys), padded(dots.iter().map(|dot| dot.at.x))) else { return Ok(None) };
    let drawn = draw(title, SIZE, |area| {
        let format = decimals(ys.1 - ys.0);
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .x_label_area_size(42)
            .y_label_area_size(64)
            .build_cartesian_2d(Axis::numbers(xs, 5), Axis::numbers(ys, 6))
            .map_err(said)?;
        mesh(&mut chart, (x, y), &|x| short(*x, xs.1 - xs.0), &|y| label(*y, format))?;
        let mut labels = Vec::new();
        for dot in dots {
            let ends = [dot.at.low, dot.at.high].map(|y| chart.backend_coord(&(dot.at.x, y)));
            area.draw(&PathElement::new(ends.to_vec(), colour(dot.arm).stroke_width(2))).map_err(said)?;
            let place = chart.backend_coord(&(dot.at.x, dot.at.y));
            mark(area, place, dot.arm)?;
            labels.push((place, dot));
        }
        // From top to bottom, each name as near to its mark as other names and marks allow, to the right rather than to the left.
        labels.sort_by_key(|(place, _)| place.1);
        let mut placed: Vec<[i32; 3]> = labels.iter().map(|((x, y), _)| [x - 6, x + 6, *y]).collect();
        let (width, height) = (SIZE.0 as i32, SIZE.1 as i32 - 60);
        for ((x, y), dot) in labels {
            let length = dot.name.chars().map(|char| if char.is_uppercase() { 10 } else { 7 }).sum::<i32>();
            let lines = (0..height / LINE).flat_map(|line| [y + line * LINE, y - line * LINE]);
            let places = lines.flat_map(|at| [[x + 10, x + 10 + length, at], [x - 10 - length, x - 10, at]]);
            let fits = |place: &[i32; 3]| place[0] >= 70 && place[1] <= width && (LINE..height).contains(&place[2]);
            let meets = |[left, right, at]: [i32; 3]| {
                placed.iter().any(|&[l, r, other]| left < r && l < right && (at - other).abs() < LINE)
            };
            let place = places.filter(fits).find(|&place| !meets(place)).unwrap_or([x + 10, x + 10 + length, y]);
            placed.push(place);
            let [left, right, at] = place;
            let (end, side) = if left > x { (left, HPos::Left) } else { (right, HPos::Right) };
            if at != y {
                area.draw(&PathElement::new(vec![(x, y), (end, at)], FAINT)).map_err(said)?;
            }
            text(area, &dot.name, (end, at), side)?;
        }
        Ok(())
    })?;
    Ok(Some(drawn))
}

/// The mark of an arm as a small figure, for the legend.
pub fn legend_mark(arm: usize) -> Result<String, String> {
    draw("", (26, 16), |area| {
        area.draw(&PathElement::new(vec![(0, 8), (26, 8)], colour(arm).stroke_width(2))).map_err(said)?;
        mark(area, (13, 8), arm)
    })
}

fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Draws into an SVG, and puts the page's colours where ours stood for them.
fn draw(title: &str, size: (u32, u32), fill: impl FnOnce(&Area<'_>) -> Result<(), String>) -> Result<String, String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        fill(&area)?;
        area.present().map_err(said)?;
    }
    let hex = |colour: RGBColor| format!("#{:02X}{:02X}{:02X}", colour.0, colour.1, colour.2);
    let mut svg = svg.replace(&hex(INK), "currentColor").replace(&hex(FAINT), "var(--faint)");
    for arm in 0..COLOURS {
        svg = svg.replace(&hex(colour(arm)), &format!("var(--arm-{arm})"));
    }
    let label = if title.is_empty() {
        "aria-hidden=\"true\"".into()
    } else {
        format!("role=\"img\" aria-label=\"{}\"", crate::page::escape(title))
    };
    Ok(svg.replacen("<svg", &format!("<svg {label}"), 1))
}

/// Axes with lines and labels at their ticks.
fn mesh(
    chart: &mut Chart<'_, '_>,
    (x, y): (&str, &str),
    x_label: &dyn Fn(&f64) -> String,
    y_label: &dyn Fn(&f64) -> String,
) -> Result<(), String> {
    let mut mesh = chart.configure_mesh();
    mesh.light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(INK)
        .axis_desc_style(("sans-serif", 14, &INK))
        .label_style(("sans-serif", 13, &INK))
        .x_label_formatter(x_label)
        .y_label_formatter(y_label)
        .x_desc(x);
    if !y.is_empty() {
        mesh.y_desc(y);
    }
    mesh.draw().map_err(said)
}

/// Marks differ by shape too, for eyes that cannot tell the colours.
fn mark(area: &Area<'_>, (x, y): (i32, i32), arm: usize) -> Result<(), String> {
    let (fill, line) = (colour(arm).filled(), colour(arm).stroke_width(2));
    match arm % 5 {
        0 => area.draw(&Circle::new((x, y), 4, fill)),
        1 => area.draw(&Polygon::new(vec![(x, y - 5), (x + 5, y + 4), (x - 5, y + 4)], fill)),
        2 => area.draw(&Rectangle::new([(x - 4, y - 4), (x + 4, y + 4)], fill)),
        3 => area
            .draw(&PathElement::new(vec![(x - 4, y - 4), (x + 4, y + 4)], line))
            .and_then(|()| area.draw(&PathElement::new(vec![(x - 4, y + 4), (x + 4, y - 4)], line))),
        _ => area.draw(&Polygon::new(vec![(x, y - 6), (x + 6, y), (x, y + 6), (x - 6, y)], fill)),
    }
    .map_err(said)
}

fn text(area: &Area<'_>, words: &str, at: (i32, i32), side: HPos) -> Result<(), String> {
    let style = ("sans-serif", 13, &INK).into_text_style(area).pos(Pos::new(side, VPos::Center));
    area.draw(&Text::new(words.to_owned(), at, style)).map_err(said)
}

/// The part of a line that is not above `top`.
fn inside(a: At, b: At, top: f64) -> Option<((f64, f64), (f64, f64))> {
    let crossing = || {
        let part = (top - a.y) / (b.y - a.y);
        (a.x + part * (b.x - a.x), top)
    };
    match (a.y <= top, b.y <= top) {
        (true, true) => Some(((a.x, a.y), (b.x, b.y))),
        (true, false) => Some(((a.x, a.y), crossing())),
        (false, true) => Some((crossing(), (b.x, b.y))),
        (false, false) => None,
    }
}

/// Smallest and largest value with a margin; `None` without a finite value.
fn padded(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let (low, high) = values
        .filter(|value| value.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    let margin = 0.07 * (high - low);
    let margin = if margin > 0.0 { margin } else { 0.05 * high.abs().max(1e-6) };
    (low <= high).then_some((low - margin, high + margin))
}

/// Round numbers of a range, 1, 2 or 5 times a power of ten apart: at most one more than `most`.
fn round_numbers(low: f64, high: f64, most: usize) -> Vec<f64> {
    let least = (high - low) / most as f64;
    let power = 10f64.powf(least.log10().floor());
    let step = [1.0, 2.0, 5.0].map(|digit| digit * power).into_iter().find(|&step| step >= least);
    let step = step.unwrap_or(10.0 * power);
    ((low / step).ceil() as i64..=(high / step).floor() as i64).map(|at| at as f64 * step).collect()
}

/// The decimal logarithms of round numbers, of a range of logarithms: 1, 2 and 5 times powers of ten, powers alone where there are many of
/// them, and every number of one step where there are few.
fn round_logarithms(low: f64, high: f64, most: usize) -> Vec<f64> {
    let powers = || (low.floor() as i32..=high.floor() as i32).map(f64::from);
    let inside = |at: &f64| (low..=high).contains(at);
    for digits in [&[1.0, 2.0, 5.0][..], &[1.0]] {
        let all = powers().flat_map(|power| digits.iter().map(move |digit: &f64| power + digit.log10()));
        let all = Vec::from_iter(all.filter(inside));
        if (3..=most).contains(&all.len()) {
            return all;
        }
    }
    match high - low < 2.0 {
        true => round_numbers(10f64.powf(low), 10f64.powf(high), most).into_iter().map(f64::log10).collect(),
        false => round_numbers(low, high, most),
    }
}

/// Decimals that tell six labels of a range apart.
fn decimals(range: f64) -> usize {
    (-(range / 6.0).log10().floor()).clamp(0.0, 6.0) as usize
}

/// A label with so many decimals; rounding leaves no negative zero.
fn label(value: f64, decimals: usize) -> String {
    let text = format!("{value:.decimals$}");
    if text.trim_start_matches(['-', '0', '.']).is_empty() { text.replace('-', "") } else { text }
}

/// Three digits: `2.5e13`, `3.21`.
fn significant(value: f64) -> String {
    let scientific = format!("{value:.2e}");
    let (digits, power) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let digits = digits.trim_end_matches('0').trim_end_matches('.');
    match power.parse::<i32>() {
        Ok(power @ (-3..2)) => {
            let places = (2 - power) as usize;
            format!("{value:.places$}").trim_end_matches('0').trim_end_matches('.').into()
        }
        Ok(2..4) => format!("{value:.0}"),
        _ => format!("{digits}e{power}"),
    }
}

/// `1.5M`, in labels of a range of this width.
fn short(value: f64, range: f64) -> String {
    match range {
        _ if value == 0.0 => "0".into(),
        range if range >= 1e6 => format!("{}M", label(value / 1e6, decimals(range / 1e6))),
        range if range >= 1e4 => format!("{}k", label(value / 1e3, decimals(range / 1e3))),
        range => label(value, decimals(range)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn figures_hold_no_colour_of_their_own() {
        let points = vec![At::around(0.0, 3.0, 0.1), At::around(10.0, 1.0, 0.2)];
        let drawn = vec![Curve::joined(0, points.clone()), Curve { drawn: Drawn::Line, ..Curve::joined(9, points) }];
        let figure = Curves { cut: true, ..Curves::of("loss <over> tokens", "tokens", "loss", drawn) };
        let row = |name: &str| Row { arm: 1, name: name.into(), values: vec![1.0, 2.0], mean: 1.5, margin: Some(6.0) };
        let dot = |arm| Dot { arm, name: "an arm".into(), at: At::around(5.0, 1.0, 0.0) };
        for svg in [
            curves(&figure).unwrap().unwrap(),
            dot_plot("dots", "loss", &[row("a"), row("b & c")], true).unwrap().unwrap(),
            scatter("scatter", "bytes", "loss", &[dot(0), dot(1)]).unwrap().unwrap(),
        ] {
            assert!(svg.starts_with("<svg role=\"img\" aria-label=") && svg.contains("currentColor"), "{svg}");
            assert!(svg.contains("var(--arm-") && !svg.contains("\"#"), "{svg}");
        }
        assert!(scatter("none", "x", "y", &[]).unwrap().is_none());
    }

    #[test]
    fn numbers_are_as_long_as_they_need_to_be() {
        assert_eq!((decimals(0.06), decimals(6.0), decimals(6000.0)), (2, 0, 0));
        assert_eq!((label(-0.001, 2), label(-0.01, 2)), ("0.00".into(), "-0.01".into()));
        assert_eq!(
            (short(2e6, 3e6), short(12_345.0, 2e4), short(0.25, 0.3)),
            ("2.0M".into(), "12k".into(), "0.25".into())
        );
        assert_eq!([2.5e13, 1e12, 3.214, 0.0124, 321.4].map(significant), ["2.5e13", "1e12", "3.21", "0.0124", "321"]);
        assert_eq!([0.001, 2.0, 400.0, 1.9999].map(significant), ["0.001", "2", "400", "2"]);
    }

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!(round_numbers(0.3, 9.9, 5), [2.0, 4.0, 6.0, 8.0]);
        assert_eq!(round_numbers(-1.0, 1.0, 4), [-1.0, -0.5, 0.0, 0.5, 1.0]);
        let powers = |low: f64, high: f64| {
            Vec::from_iter(round_logarithms(low.log10(), high.log10(), 5).iter().map(|at| significant(10f64.powf(*at))))
        };
        assert_eq!(powers(1e-3, 1.1e-2), ["0.001", "0.002", "0.005", "0.01"]);
        assert_eq!(powers(1.2e-3, 5.2e-3), ["0.002", "0.003", "0.004", "0.005"]);
        assert_eq!(powers(0.9, 1e4), ["1", "10", "100", "1000", "1e4"]);
        assert_eq!(powers(1e12, 1e30), ["1e15", "1e20", "1e25", "1e30"]);
        assert_eq!(powers(1.97, 2.45), ["2", "2.1", "2.2", "2.3", "2.4"]);
    }
}

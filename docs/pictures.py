#!/usr/bin/env python3
"""Draws the pictures of the pages of mechanisms and procedures: docs/src/images/methods/NAME.svg.

    docs/pictures.py            needs nothing but Python

A picture is a list of shapes. A box stands at column x (0 to 100) and row y; `a>b` is an arrow between boxes, `a>b:word` with a word
beside it. A grid is a map of queries (down) and keys (across): # read, + partly or by their mean, . not. Cards are light on any ground.
"""

import html
import pathlib

WIDTH, ROW, TOP, BOX = 640, 62, 34, 30
FILL = {"q": "#dbeafe", "kv": "#ffedd5", "noise": "#fecaca", "gate": "#dcfce7", "frozen": "#e5e7eb", "off": "#f9fafb", "": "#ffffff"}
CELL = {"#": "#1d4ed8", "+": "#93c5fd", "s": "#ea580c", ".": "#f3f4f6"}


def escaped(text):
    return html.escape(text, quote=True)


class Picture:
    def __init__(self, about):
        self.about, self.boxes, self.under, self.over, self.height = about, {}, [], [], 0

    def box(self, name, x, y, text, kind="", width=None):
        """A box; its name is how arrows find it."""
        cx, cy = 20 + x / 100 * (WIDTH - 40), TOP + y * ROW
        width = width or max(30, 8.4 * len(text) + 14)
        self.boxes[name] = (cx, cy, width)
        dash = ' stroke-dasharray="4 3"' if kind == "off" else ""
        self.over.append(
            f'<rect x="{cx - width / 2:.0f}" y="{cy - BOX / 2:.0f}" width="{width:.0f}" height="{BOX}" rx="5" fill="{FILL[kind]}" stroke="#4b5563"{dash}/>'
        )
        self.text(cx, cy + 5, text, "#6b7280" if kind == "off" else "#111827")
        self.height = max(self.height, cy + BOX)
        return self

    def row(self, y, *boxes):
        """Boxes beside each other, spread evenly: (name, text, kind)."""
        for at, (name, text, *kind) in enumerate(boxes):
            self.box(name, (at + 0.5) * 100 / len(boxes), y, text, *kind)
        return self

    def text(self, cx, cy, text, colour="#111827", anchor="middle", size=14):
        self.over.append(f'<text x="{cx:.0f}" y="{cy:.0f}" fill="{colour}" text-anchor="{anchor}" font-size="{size}">{escaped(text)}</text>')
        self.height = max(self.height, cy + 10)

    def note(self, x, y, text):
        self.text(20 + x / 100 * (WIDTH - 40), TOP + y * ROW + 5, text, "#374151", size=13)
        return self

    def arrows(self, words):
        """Arrows, apart by spaces."""
        for word in words.split():
            ends, _, label = word.partition(":")
            a, b = ends.split(">")
            (ax, ay, aw), (bx, by, bw) = self.boxes[a], self.boxes[b]
            if abs(ay - by) < 1:
                way = 1 if bx > ax else -1
                x1, y1, x2, y2 = ax + way * aw / 2, ay, bx - way * (bw / 2 + 6), by
            else:
                way = 1 if by > ay else -1
                x1, y1, x2, y2 = ax, ay + way * BOX / 2, bx, by - way * (BOX / 2 + 6)
            self.under.append(f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}" stroke="#4b5563" marker-end="url(#tip)"/>')
            if label:
                self.text((x1 + x2) / 2 + 6, (y1 + y2) / 2 + 4, label.replace("_", " "), "#374151", "start", 13)
        return self

    def grid(self, x, y, title, rows, cell=13):
        """A map, with its middle at column x and its top at row y."""
        left, top = 20 + x / 100 * (WIDTH - 40) - cell * len(rows[0]) / 2, TOP + y * ROW
        for down, row in enumerate(rows):
            for across, sign in enumerate(row):
                self.over.append(
                    f'<rect x="{left + across * cell:.1f}" y="{top + down * cell:.1f}" width="{cell - 1}" height="{cell - 1}" fill="{CELL[sign]}"/>'
                )
        self.text(left + cell * len(rows[0]) / 2, top + cell * len(rows) + 18, title, "#374151", size=13)
        return self

    def line(self, points, colour="#1d4ed8"):
        """A line through points in columns and rows."""
        path = " ".join(f"{20 + x / 100 * (WIDTH - 40):.1f},{TOP + y * ROW:.1f}" for x, y in points)
        self.under.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        self.height = max(self.height, TOP + max(y for _, y in points) * ROW + 10)
        return self

    def svg(self):
        height = self.height + 12
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escaped(self.about)}" '
            'font-family="system-ui, sans-serif">\n'
            '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="4" orient="auto"><path d="M0 0 8 4 0 8z" fill="#4b5563"/></marker></defs>\n'
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:.0f}" rx="8" fill="#ffffff" stroke="#d1d5db"/>\n'
            + "\n".join(self.under + self.over)
            + "\n</svg>\n"
        )


def bell(middle, width, bottom=2.2, height=1.7, left=2, right=98):
    from math import exp

    points = [left + (right - left) * at / 80 for at in range(81)]
    return [(x, bottom - height * exp(-(((x - middle) / width) ** 2) / 2)) for x in points]


def causal(size, read):
    return ["".join(("." if key > query else read(query, key)) for key in range(size)) for query in range(size)]


PICTURES = {}


def picture(name, about):
    PICTURES[name] = Picture(about)
    return PICTURES[name]


p = picture("softmax", "Four query heads with four key/value heads (MHA), with two (GQA), and with one (MQA)")
for at, (title, shared) in enumerate([("MHA", 1), ("GQA", 2), ("MQA", 4)]):
    left = 3 + at * 34
    for head in range(4):
        p.box(f"q{at}{head}", left + head * 8.5, 0, f"q{head + 1}", "q", 34)
    for head in range(4 // shared):
        p.box(f"k{at}{head}", left + (head + 0.5) * 8.5 * shared - 4.25, 1.1, f"kv{head + 1}", "kv", 40)
    p.arrows(" ".join(f"q{at}{head}>k{at}{head // shared}" for head in range(4)))
    p.note(left + 13, 1.75, title)

p = picture("grouped_differential", "A noise head's output is subtracted from each of the three signal heads of its group")
p.row(0, ("s1", "signal 1", "q"), ("s2", "signal 2", "q"), ("s3", "signal 3", "q"), ("n", "noise", "noise"))
p.row(1, ("o1", "O1 − λ O2"), ("o2", "O1 − λ O2"), ("o3", "O1 − λ O2"), ("O2", "O2", "noise"))
p.arrows("s1>o1 s2>o2 s3>o3 n>O2 O2>o3")
p.row(2, ("y", "norm of each head, times (1 − λ_init), then o_proj"))
p.arrows("o1>y o2>y o3>y")

p = picture("diff_v2", "Of two neighbouring heads with the same key and value, the second is subtracted with a weight of the position's own")
p.row(0, ("a0", "a0", "q"), ("a1", "a1", "noise"), ("a2", "a2", "q"), ("a3", "a3", "noise"))
p.box("c0", 25, 1, "c0 = a0 − σ(l0) a1").box("c1", 75, 1, "c1 = a2 − σ(l1) a3").box("y", 50, 2, "o_proj")
p.arrows("a0>c0 a1>c0 a2>c1 a3>c1 c0>y c1>y").note(50, 1, "l = x Wλ")

p = picture("mixture_of_head", "A router selects two of four routed heads at a position; the shared heads always take part")
p.box("x", 12, 0, "x").box("r", 70, 0, "router", "gate").arrows("x>r")
p.row(1, ("h1", "shared", "q"), ("h2", "shared", "q"), ("h3", "head 3", "off"), ("h4", "head 4", "q"), ("h5", "head 5", "q"), ("h6", "head 6", "off"))
p.row(2, ("y", "y = Σ g_i H_i W_i over the selected heads"))
p.arrows("x>h1 x>h2 r>h4 r>h5 h1>y h2>y h4>y h5>y")

p = picture("decoupled_head", "Four query heads share two key heads and three value heads by maps of their own")
p.row(0, ("k1", "k1", "kv"), ("k2", "k2", "kv"))
p.row(1, ("q1", "head 1", "q"), ("q2", "head 2", "q"), ("q3", "head 3", "q"), ("q4", "head 4", "q"))
p.row(2, ("v1", "v1", "kv"), ("v2", "v2", "kv"), ("v3", "v3", "kv"))
p.arrows("k1>q1 k1>q2 k2>q3 k2>q4 v1>q1 v2>q2 v2>q3 v3>q4")

p = picture("key_driven", "The key head with the larger norm is read by six query heads, the other one by two")
p.row(0, *[(f"q{at}", f"q{at + 1}", "q") for at in range(8)])
p.box("k0", 37, 1.2, "kv1: Σ|k| large", "kv", 200).box("k1", 87, 1.2, "kv2: small", "kv", 100)
p.arrows(" ".join(f"q{at}>k{int(at > 5)}" for at in range(8)))

p = picture("gated_attention", "A gate computed from the layer's input multiplies what the heads read, before the output projection")
p.row(0, ("x", "x"))
p.box("q", 15, 1, "q", "q").box("k", 35, 1, "k", "kv").box("v", 55, 1, "v", "kv").box("g", 85, 1, "σ(x Wg)", "gate")
p.box("a", 35, 2, "softmax(q kᵀ / √e) v").box("m", 60, 3, "⊙").box("y", 85, 3, "o_proj")
p.arrows("x>q x>k x>v x>g q>a k>a v>a a>m:G1 g>m m>y")

p = picture("sink", "A learnable logit takes part in the softmax over the keys and has no value")
p.row(0, ("z1", "z1", "q"), ("z2", "z2", "q"), ("z3", "z3", "q"), ("s", "s_h, learned", "gate"))
p.row(1, ("f", "softmax over all of them", "", 560))
p.row(2, ("p1", "p1 v1", "kv"), ("p2", "p2 v2", "kv"), ("p3", "p3 v3", "kv"), ("n", "no value", "off"))
p.arrows("z1>f z2>f z3>f s>f f>p1 f>p2 f>p3 f>n")

p = picture("mla", "All heads' keys and values are projections of one cached latent; one rotated key is shared")
p.row(0, ("x", "x"))
p.box("q", 14, 1, "q of each head", "q").box("c", 52, 1, "c, cached", "kv").box("kp", 85, 1, "k_p, cached", "kv")
p.box("kn", 42, 2, "k_n of each head", "kv").box("v", 68, 2, "v of each head", "kv").box("y", 42, 3, "softmax(q_n·k_n + q_p·k_p) v, then o_proj")
p.arrows("x>q x>c:W_kva x>kp c>kn:W_kvb c>v q>y kn>y v>y kp>y")

p = picture("gated_delta_net", "One matrix per head is decayed, corrected by the delta rule, and read")
p.box("s0", 8, 0, "S at t − 1", "kv").box("d", 29, 0, "e^g S, decayed").box("w", 62, 0, "+ k ⊗ β (v − (e^g S)ᵀ k)", "gate").box("s1", 92, 0, "S at t", "kv")
p.box("x", 45, 1.2, "token t: q, k, v, β, g", "q").box("o", 92, 1.2, "o = Sᵀ q").arrows("s0>d d>w w>s1 x>w x>d s1>o x>o")

p = picture("hilo", "Hi-Fi heads read windows of the grid, Lo-Fi heads the means of all windows")
p.grid(25, 0, "Hi-Fi: a token reads its window", ["###....."[:6], "###...", "###...", "......", "......", "......"], 18)
p.grid(75, 0, "Lo-Fi: it reads the mean of every window", ["+++sss", "+++sss", "+++sss", "sss+++", "sss+++", "sss+++"], 18)

p = picture("token_centres", "Tokens are sorted by their nearest centre and cut into groups; each reads its group, the next one, and all centres")
p.row(0, ("t", "tokens of the image", "q"), ("m", "centres (k-means, kept)", "kv"))
p.row(1, ("g1", "group 1", "q"), ("g2", "group 2", "q"), ("g3", "group 3", "q"), ("g4", "group 4", "q"))
p.row(2, ("y", "attention over own group and the next  +  attention over the centres"))
p.arrows("m>t:sort t>g1 t>g2 g1>g2 g2>g3 g3>g4 g1>y g2>y g3>y g4>y")

p = picture("gaussian_adaptive", "A Gaussian placed by the mean and the variance of the data: elements near the shifted mean pass, outliers are damped")
p.line(bell(55, 13)).line([(2, 2.2), (98, 2.2)], "#4b5563").line([(45, 2.2), (45, 0.9)], "#9ca3af").line([(55, 2.2), (55, 0.5)], "#ea580c")
p.note(45, 2.55, "μ").note(55, 2.55, "μ + δ").note(80, 1.0, "width: c, learned").note(12, 1.95, "outliers: gate near 0")

p = picture("pooling", "Five ways to make one vector of the tokens")
p.row(0, ("t1", "token 1", "q"), ("t2", "token 2", "q"), ("t3", "token 3", "q"), ("t4", "token n", "q"))
p.row(1, ("m", "mean"), ("c", "class_token", "gate"), ("l", "last_token"), ("g", "ggem", "gate"), ("q", "mltp", "gate"))
p.row(2, ("y", "one vector")).arrows("t1>m t2>m t2>c t4>l t3>g t4>g t4>q m>y c>y l>y g>y q>y")

p = picture("standard", "A step: forward passes, backward passes, clipping, one update")
p.row(0, ("b", "batches", "q"), ("f", "forward"), ("l", "mean loss"), ("g", "backward"))
p.row(1, ("t", "weights θ", "kv"), ("u", "AdamW or Muon", "gate"), ("c", "clip to max_norm")).arrows("b>f f>l l>g g>c c>u u>t t>f")

p = picture("bilevel", "Fast weights take K steps on the batch, the loss through them changes the weights, and they are discarded")
p.row(0, ("p0", "φ0 fresh", "gate"), ("p1", "φ1", "gate"), ("pk", "φK", "gate"), ("x", "discarded", "off"))
p.row(1, ("b", "batch", "q"), ("l", "L(θ, φK)"), ("u", "AdamW on θ", "kv")).arrows("p0>p1:step p1>pk pk>x pk>l b>p0 b>l l>u")

p = picture("fusion", "Heads of their own are mixed more and more with those of their group, until they are the same and are merged")
p.row(0, ("a1", "k1", "kv"), ("a2", "k2", "kv"), ("m1", "Ω k", "gate"), ("m2", "Ω k", "gate"), ("s1", "same", "kv"), ("s2", "same", "kv"))
p.box("one", 83, 1, "merged: one head", "kv").arrows("a2>m1 m2>s1 s1>one s2>one").note(16, 0.75, "at first Ω = identity").note(50, 0.75, "Ω → the mean of the group")

p = picture("neuron_dropout", "Embeddings of texts are followed over intervals; the coordinates that vary most are set to 0 for a while")
p.row(0, ("t", "texts kept out", "q"), ("e1", "e at t − 1"), ("e2", "e at t"), ("v", "V = Var · Σ |Δe|", "gate")).arrows("t>e1 e1>e2 e2>v")
p.row(1.1, *[(f"h{at}", "0" if at in (2, 5) else "h", "off" if at in (2, 5) else "kv") for at in range(8)])
p.arrows("v>h5 v>h2").note(25, 1.75, "coordinates of the layer's output in training")

p = picture("boundaries", "Two windows of keys beside a gap are encoded together and compared; the predictor says whether a chunk ends there")
p.row(0, *[(f"k{at}", f"k{at + 1}", "kv") for at in range(8)])
p.box("l", 25, 1, "l: pooled").box("r", 75, 1, "r: pooled").box("m", 50, 2, "MLP[l, r, |l − r|, l r, cos]", "gate").box("y", 50, 3, "a boundary?")
p.arrows("k0>l k1>l k2>l k3>l k4>r k5>r k6>r k7>r l>m r>m m>y")

p = picture("attention_shifting", "The trained model's map follows the frozen model's map, from which important tokens of texts to forget are shifted away")
p.grid(14, 0, "frozen: a", causal(6, lambda q, k: "#" if k in (0, 2) else "+"), 16)
p.grid(50, 0, "target: token 3 shifted away", causal(6, lambda q, k: "." if k == 2 else ("#" if k == 0 else "+")), 16)
p.grid(86, 0, "trained: q and k with LoRA", causal(6, lambda q, k: "." if k == 2 else ("#" if k == 0 else "+")), 16)
p.note(32, 0.7, "× f, to sum 1").note(68, 0.7, "KL")

p = picture("lora", "The input goes through the frozen weight and through a low-rank pair beside it; both are added")
p.row(0, ("x", "x", "q")).box("w", 25, 1, "W, frozen", "frozen").box("a", 65, 1, "A: d_in × rank", "gate").box("b", 65, 2, "B: rank × d_out", "gate")
p.box("y", 25, 3, "y = x W + (alpha / rank) x A B").arrows("x>w x>a a>b w>y b>y")

p = picture("growth", "A unit is repeated; what reads it is divided by the number of replicas, and noise that sums to zero tells them apart")
p.box("u", 20, 0, "unit u", "q").box("r", 20, 1.2, "reads w u", "kv").box("u1", 62, 0, "u", "q").box("u2", 88, 0, "u", "q")
p.box("r2", 75, 1.2, "reads (w/2 + ε) u + (w/2 − ε) u", "kv").box("g", 40, 0, "grow", "gate").arrows("u>r u>g g>u1 u1>r2 u2>r2")

p = picture("worst_group", "A tilt weighs the losses of groups, from their mean to that of the worst")
p.row(0, ("a", "group A: 0.2", "q"), ("b", "group B: 0.3", "q"), ("c", "group C: 1.4", "noise"))
p.row(1, ("t", "1/t · log mean exp(t · L)", "gate")).row(2, ("m", "t = 0: 0.63"), ("o", "t = 1: 0.79"), ("w", "t → ∞: 1.4"))
p.arrows("a>t b>t c>t t>m t>o t>w")

p = picture("sparse", "What queries read under shifted chunks, under chosen blocks, and with keys that are dropped")
p.grid(14, 0, "shifted: chunks of 4", causal(12, lambda q, k: "#" if (q + 2) // 4 == (k + 2) // 4 else "."))
p.grid(50, 0, "blocks: the best, or means", causal(12, lambda q, k: "#" if q // 3 == k // 3 or (q // 3, k // 3) in ((1, 0), (2, 0), (3, 1)) else "+"))
p.grid(86, 0, "h2o: heavy and last keys", causal(12, lambda q, k: "#" if q - k < 4 else ("s" if k in (0, 3) else ".")))

p = picture("masked_diffusion", "Generation fills in masks, the surest first")
for at, words in enumerate(["a _ _ _ _ _", "a _ b _ _ c", "a d b _ _ c", "a d b e f c"]):
    p.row(at * 0.62, *[(f"m{at}{place}", "mask" if word == "_" else f"t{place + 1}", "off" if word == "_" else "q") for place, word in enumerate(words.split())])

if __name__ == "__main__":
    folder = pathlib.Path(__file__).resolve().parent / "src/images/methods"
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawn in PICTURES.items():
        (folder / f"{name}.svg").write_text(drawn.svg(), encoding="utf-8")

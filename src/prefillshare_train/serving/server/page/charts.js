// The charts and numbers beside the conversation, drawn from /stats once a second.

const SVG = "http://www.w3.org/2000/svg";
const POINTS = 120;
const PERIOD_MS = 1000;
const WIDTH = 240;
const HEIGHT = 80;

/** The class that gives the decoder its colour, everywhere on the page. */
export const tint = (index) => `tint${index % 6}`;

export const milliseconds = (seconds) =>
  seconds === null || seconds === undefined ? "–"
    : seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(2)} s`;

const percent = (share) => (share === null ? "–" : `${Math.round(share * 100)} %`);

/** A line chart whose lines are lists of numbers, null where nothing is known yet. */
class Chart {
  constructor(figure, format) {
    this.output = figure.querySelector("output");
    this.format = format;
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("role", "img");
    this.name = figure.querySelector("figcaption").firstChild.data.trim();
    this.svg.setAttribute("aria-label", this.name);
    this.scale = element("div", "scale");
    this.legend = element("ul", "legend");
    figure.append(this.svg, this.scale, this.legend);
    this.lines = new Map();
  }

  line(name, tintClass, { area = false } = {}) {
    this.lines.set(name, { values: [], tintClass, area });
    const entry = element("li", tintClass);
    entry.textContent = name;
    this.legend.append(entry);
  }

  push(values, { shown, top = null }) {
    for (const [name, line] of this.lines) {
      line.values.push(values[name] ?? line.values.at(-1) ?? null);
      if (line.values.length > POINTS) line.values.shift();
    }
    this.output.textContent = shown;
    this.svg.setAttribute("aria-label", `${this.name}: ${shown}`);
    this.draw(top);
  }

  draw(top) {
    const known = [...this.lines.values()].flatMap((line) => line.values.filter((v) => v !== null));
    const limit = top ?? Math.max(...known, 1e-9) * 1.1;
    const x = (index, length) => WIDTH - (length - 1 - index) * (WIDTH / (POINTS - 1));
    const y = (value) => HEIGHT - 2 - (HEIGHT - 4) * Math.min(value / limit, 1);
    const shapes = [1, HEIGHT / 2, HEIGHT - 1].map((height) =>
      shape("line", { x1: 0, x2: WIDTH, y1: height, y2: height, class: "grid" }));
    for (const { values, tintClass, area } of this.lines.values()) {
      const points = values
        .map((value, index) => (value === null ? null : [x(index, values.length), y(value)]))
        .filter((point) => point !== null);
      if (points.length === 0) continue;
      const text = points.map((point) => point.map((n) => n.toFixed(1)).join(",")).join(" ");
      if (area) {
        const closed = `${points[0][0].toFixed(1)},${HEIGHT} ${text} ${WIDTH},${HEIGHT}`;
        shapes.push(shape("polygon", { points: closed, class: `area ${tintClass}` }));
      }
      shapes.push(shape("polyline", { points: text, class: `line ${tintClass}` }));
    }
    this.svg.replaceChildren(...shapes);
    const ends = [element("span"), element("span")];
    ends[0].textContent = `2 min, up to ${this.format(known.length || top !== null ? limit : null)}`;
    ends[1].textContent = "now";
    this.scale.replaceChildren(...ends);
  }
}

/** Draws until the page is left; `onState` hears whether the server is ready, stopping or offline. */
export function startCharts(decoders, request, onState) {
  const hits = new Chart(document.getElementById("chart-hits"), percent);
  hits.line("lately", "tint-cached", { area: true });
  hits.line("since start", "tint-own");
  const ttft = new Chart(document.getElementById("chart-ttft"), milliseconds);
  decoders.forEach((name, index) => ttft.line(name, tint(index)));
  const blocks = new Chart(document.getElementById("chart-blocks"), String);
  blocks.line("held", "tint0", { area: true });
  blocks.line("held or findable", "tint-cached");
  let before = null;

  async function tick() {
    if (document.hidden) return;
    let stats;
    try {
      const response = await request("/stats");
      if (!response.ok) {
        onState(response.status === 401 ? "needs a key" : "offline");
        return;
      }
      stats = await response.json();
    } catch {
      onState("offline");
      return;
    }
    onState(stats.accepting ? "ready" : "stopping");
    const { engine } = stats;
    const prompt = engine.prompt_tokens - (before?.prompt_tokens ?? 0);
    const cached = engine.cached_tokens - (before?.cached_tokens ?? 0);
    before = engine;
    hits.push(
      { lately: prompt > 0 ? cached / prompt : null, "since start": stats.hit_ratio },
      { shown: percent(stats.hit_ratio), top: 1 },
    );
    const latest = Object.fromEntries(
      decoders.map((name) => [name, stats.decoders[name]?.ttft_last_s ?? null]));
    const medians = decoders.map((name) => stats.decoders[name]?.ttft_p50_s ?? null)
      .filter((value) => value !== null);
    const ends = [...new Set([Math.min(...medians), Math.max(...medians)].map(milliseconds))];
    ttft.push(latest, { shown: medians.length ? `median ${ends.join(" to ")}` : "–" });
    const taken = engine.blocks_used + engine.blocks_cached;
    blocks.push(
      { held: engine.blocks_used, "held or findable": taken },
      { shown: `${taken} of ${engine.blocks_total}`, top: engine.blocks_total },
    );
    showNumbers(engine);
  }

  tick();
  const timer = setInterval(tick, PERIOD_MS);
  window.addEventListener("pagehide", () => clearInterval(timer));
}

function showNumbers(engine) {
  const rows = [
    ["Waiting", engine.waiting],
    ["Prefilling", engine.prefilling],
    ["Decoding", engine.decoding],
    ["Sessions", engine.sessions],
    ["Prompt tokens", engine.prompt_tokens],
    ["… prefilled by the base", engine.prefilled_tokens],
    ["Staged blocks", engine.staged_blocks],
  ];
  const parts = rows.flatMap(([name, value]) => {
    const term = element("dt");
    const detail = element("dd");
    term.textContent = name;
    detail.textContent = value.toLocaleString("en");
    return [term, detail];
  });
  document.getElementById("numbers").replaceChildren(...parts);
}

function element(name, className = "") {
  const made = document.createElement(name);
  made.className = className;
  return made;
}

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// Numbers as text, elements, and the two charts.

/** A probability as a percentage with three digits that matter. */
export function percent(probability) {
  const points = 100 * probability;
  const decimals = points >= 10 || points === 0 ? 1 : Math.min(2 - Math.floor(Math.log10(points)), 8);
  return `${points.toFixed(decimals)} %`;
}

/** A difference of probabilities in percentage points, signed. */
export function points(difference) {
  const size = Math.abs(100 * difference);
  const text = size.toFixed(size >= 0.995 || size === 0 ? 2 : 3);
  if (Number(text) === 0) return "0";
  return `${difference > 0 ? "+" : "−"}${text}`;
}

/** A new element with properties and children; text is never read as markup. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** A bar from zero to `value` on a scale from `least` (at most 0) to `most` (at least 0). */
export function bar(value, least, most) {
  const place = (number) => 100 * (number - least) / (most - least || 1);
  const zero = element("b"), fill = element("i", { className: value > 0 ? "up" : "down" });
  zero.style.left = `${place(0)}%`;
  fill.style.left = `${place(Math.min(value, 0))}%`;
  fill.style.width = `${place(Math.max(value, 0)) - place(Math.min(value, 0))}%`;
  const track = element("div", { className: "track" }, zero, fill);
  track.setAttribute("aria-hidden", "true");
  return track;
}

/** Predicted against observed rate by bin, with intervals and the diagonal on which both agree. */
export function calibrationPlot(bins, event) {
  const size = 420, left = 64, right = 26, top = 12, bottom = 46;
  const step = tickStep(Math.max(...bins.map((bin) => Math.max(bin.predicted, bin.observed, bin.observed / 2 + bin.high / 2))));
  const largest = Math.min(1, step.size * step.number);
  const x = (value) => left + value / largest * (size - left - right);
  const y = (value) => size - bottom - Math.min(value / largest, 1) * (size - top - bottom);
  const plot = svg("svg", { viewBox: `0 0 ${size} ${size}`, role: "img", class: "calibration" });
  plot.append(svg("title", {}, `Predicted ${event.rate} against observed ${event.rate}, by bins of equally many rows`));
  for (let i = 0; i * step.size <= largest + 1e-9; i++) {
    const value = i * step.size, label = `${Number((100 * value).toPrecision(6))} %`;
    plot.append(
      svg("line", { class: "grid", x1: x(value), x2: x(value), y1: y(0), y2: y(largest) }),
      svg("line", { class: "grid", x1: x(0), x2: x(largest), y1: y(value), y2: y(value) }),
      svg("text", { x: x(value), y: size - bottom + 17, "text-anchor": "middle" }, label),
      svg("text", { x: left - 7, y: y(value) + 4, "text-anchor": "end" }, label),
    );
  }
  plot.append(svg("line", { class: "ideal", x1: x(0), y1: y(0), x2: x(largest), y2: y(largest) }));
  plot.append(svg("text", { x: (left + size - right) / 2, y: size - 8, "text-anchor": "middle", class: "axis" }, "predicted"));
  plot.append(svg("text", {
    x: 0, y: 0, transform: `translate(13 ${(top + size - bottom) / 2}) rotate(-90)`, "text-anchor": "middle", class: "axis",
  }, "observed"));
  const path = bins.map((bin) => `${x(bin.predicted).toFixed(1)},${y(bin.observed).toFixed(1)}`).join(" ");
  plot.append(svg("polyline", { class: "path", points: path }));
  for (const bin of bins) {
    const mark = svg("g", { class: "bin" });
    mark.append(
      svg("title", {}, `${bin.rows} rows, ${bin.clicks} ${event.many}: predicted ${percent(bin.predicted)}, ` +
        `observed ${percent(bin.observed)} (95 %: ${percent(bin.low)} to ${percent(bin.high)})`),
      svg("line", { x1: x(bin.predicted), x2: x(bin.predicted), y1: y(bin.low), y2: y(bin.high) }),
      svg("circle", { cx: x(bin.predicted), cy: y(bin.observed), r: 4.5 }),
    );
    plot.append(mark);
  }
  return plot;
}

function tickStep(largest) {
  const rough = Math.max(largest, 1e-6) / 4;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 2.5, 5, 10].map((factor) => factor * unit).find((candidate) => candidate >= rough * 0.999);
  return { size, number: Math.ceil(largest / size - 1e-9) };
}

function svg(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Numbers as people read them. Everything here returns plain text, never HTML.
const MINUTE = 60, HOUR = 3600, DAY = 86400;
const TIME_STEPS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400, 172800, 432000, 864000];
const BYTES = ["GiB", "MiB", "KiB", "B"], HUGE = 1e15;
const COUNTS = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]];

function digits(value, places) {
  return value.toLocaleString("en-US", { maximumFractionDigits: places, minimumFractionDigits: 0 });
}

// A reading under the cursor: about five significant digits.
function reading(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e15)) return value.toExponential(3).replace("e+", "e");
  return digits(value, size >= 1e4 ? 0 : Math.max(0, 4 - Math.floor(Math.log10(size || 1))));
}

// An axis label, with as many places as the distance between two labels needs.
function tickLabel(value, distance) {
  const size = Math.abs(value);
  if (size >= 1e4) {
    const [unit, suffix] = COUNTS.find(([least]) => size >= least);
    return digits(value / unit, places(distance / unit)) + suffix;
  }
  if (value !== 0 && distance < 1e-4) return value.toExponential(places(distance / 10 ** Math.floor(Math.log10(size)))).replace("e+", "e");
  return digits(value, places(distance));
}

// How many decimal places tell multiples of a step apart: 0.25 needs two.
function places(step) {
  let n = 0;
  while (n < 12 && Math.abs(step * 10 ** n - Math.round(step * 10 ** n)) > 1e-6 * step * 10 ** n) n += 1;
  return n;
}

// Brings the lines into a scale that their axis can label: memory in the unit that suits it, huge numbers as multiples of a power
// of ten, since uPlot labels 16 digits. What is drawn is the value times `factor`.
function scaled(columns, unit) {
  let most = 0;
  for (const column of columns.values()) for (const v of column) if (v > most || -v > most) most = Math.abs(v);
  const power = unit || most < HUGE ? 0 : 3 * Math.floor(Math.log10(most) / 3);
  let scale = { factor: 10 ** -power, unit: power ? `× 1e${power}` : unit, power };
  if (unit === "GiB" && most) {
    const place = BYTES.findIndex((name, i) => most * 1024 ** i >= 0.1 || i === BYTES.length - 1);
    scale = { factor: 1024 ** place, unit: BYTES[place], power: 0 };
  }
  if (scale.factor !== 1) for (const column of columns.values()) column.forEach((v, i) => { if (v != null) column[i] = v * scale.factor; });
  return scale;
}

function duration(seconds) {
  const sign = seconds < 0 ? "−" : "", s = Math.abs(seconds);
  if (s < MINUTE) return `${sign}${digits(s, s < 10 ? 1 : 0)} s`;
  const two = (n) => String(Math.floor(n)).padStart(2, "0");
  if (s < HOUR) return `${sign}${Math.floor(s / MINUTE)}:${two(s % MINUTE)} min`;
  if (s < DAY) return `${sign}${Math.floor(s / HOUR)}:${two((s % HOUR) / MINUTE)} h`;
  return `${sign}${Math.floor(s / DAY)} d ${Math.floor((s % DAY) / HOUR)} h`;
}

function element(tag, className, parent, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text; // text only: names come from outside
  if (parent) parent.append(made);
  return made;
}

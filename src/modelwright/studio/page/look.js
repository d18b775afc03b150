// The page that looks inside: figures come from the server, drawings are made here, and every drawing has words.

const $ = (id) => document.getElementById(id);
const ask = async (kind, body) => {
  let answer;
  try {
    answer = await fetch(`/api/look${kind ? `/${kind}` : ""}`, body === undefined ? {} : {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
    });
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error?.message ?? found.detail ?? "The server could not answer.");
  return found;
};

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const short = (value) => (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 ? value.toPrecision(4) : value.toExponential(2));

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

let surfaceFound = null;
let modelFound = null;

function drawPaths() {
  const { x, y, z, paths, minimum } = surfaceFound;
  const canvas = $("paths");
  const pen = canvas.getContext("2d");
  const { width, height } = canvas;
  const px = (v) => ((v - x[0]) / (x.at(-1) - x[0])) * width;
  const py = (v) => height - ((v - y[0]) / (y.at(-1) - y[0])) * height;
  pen.clearRect(0, 0, width, height);
  const flat = z.flat().map(Number);
  const low = Math.min(...flat);
  const high = Math.log1p(Math.max(...flat) - low);
  const cellWidth = width / x.length;
  const cellHeight = height / y.length;
  pen.fillStyle = color("--soft");
  z.forEach((row, j) => row.forEach((value, i) => {
    const level = Math.floor((Math.log1p(value - low) / high) * 16) / 16; // steps show level lines
    pen.globalAlpha = 0.45 * level;
    const left = Math.round(i * cellWidth); // whole pixels: neighbours neither overlap nor leave a gap
    const top = Math.round(height - (j + 1) * cellHeight);
    pen.fillRect(left, top, Math.round((i + 1) * cellWidth) - left, Math.round(height - j * cellHeight) - top);
  }));
  pen.globalAlpha = 1;
  pen.lineWidth = 4;
  Object.values(paths).forEach((path, at) => {
    pen.strokeStyle = pen.fillStyle = color(`--rule-${at}`);
    pen.beginPath();
    path.forEach(([a, b], step) => (step ? pen.lineTo(px(a), py(b)) : pen.moveTo(px(a), py(b))));
    pen.stroke();
    const [a, b] = path.at(-1);
    pen.beginPath();
    pen.arc(px(a), py(b), 9, 0, 7);
    pen.fill();
  });
  const [startX, startY] = Object.values(paths)[0][0];
  pen.fillStyle = color("--ink");
  pen.fillRect(px(startX) - 9, py(startY) - 9, 18, 18);
  if (minimum) {
    pen.font = "40px serif";
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.fillText("★", px(minimum[0]), py(minimum[1]));
  }
  const rows = Object.entries(paths).map(([rule, path], at) => {
    const row = make("tr");
    const name = make("th");
    name.scope = "row";
    const swatch = make("span", undefined, "swatch");
    swatch.style.background = color(`--rule-${at}`);
    name.append(swatch, rule);
    row.append(name, make("td", String(path.length - 1)), make("td", short(path[0][2])), make("td", short(path.at(-1)[2])));
    return row;
  });
  $("ends").replaceChildren(...rows);
  canvas.setAttribute("aria-label", `Paths on ${$("surface").value}: ${Object.entries(paths).map(([rule, path]) => `${rule} ends at ${short(path.at(-1)[2])}`).join(", ")}`);
}

function drawMap(head, tokens, at) {
  const size = 340;
  const figure = make("figure");
  const canvas = make("canvas");
  canvas.width = canvas.height = size;
  const pen = canvas.getContext("2d");
  const cell = size / head.length;
  const most = Math.max(...head.slice(1).flat(), 1e-6);
  pen.fillStyle = color("--map");
  head.forEach((row, j) => row.forEach((weight, i) => {
    pen.globalAlpha = Math.min(1, weight / most);
    const [left, top] = [Math.round(i * cell), Math.round(j * cell)];
    pen.fillRect(left, top, Math.round((i + 1) * cell) - left, Math.round((j + 1) * cell) - top);
  }));
  const last = head.at(-1);
  const best = last.indexOf(Math.max(...last));
  const words = `Head ${at}: the last token looks most at “${tokens[best]}” (${Math.round(100 * last[best])} %)`;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", words);
  figure.append(canvas, make("figcaption", words));
  return figure;
}

function drawHistogram(layer) {
  const figure = make("figure");
  const canvas = make("canvas");
  canvas.width = 420;
  canvas.height = 150;
  const pen = canvas.getContext("2d");
  const most = Math.log1p(Math.max(...layer.counts));
  const wide = canvas.width / layer.counts.length;
  pen.fillStyle = color(layer.name.includes("units") ? "--rule-1" : "--rule-0");
  layer.counts.forEach((count, at) => {
    const tall = (Math.log1p(count) / most) * (canvas.height - 6);
    pen.fillRect(at * wide + 0.5, canvas.height - tall, wide - 1, tall);
  });
  const dead = layer.name.includes("units") ? `; ${layer.num_dead} of ${layer.num_units} dead` : "";
  const words = `${layer.name}: spread ${short(layer.deviation)}, largest ${short(layer.largest)}${dead}`;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", words);
  figure.append(canvas, make("figcaption", words));
  return figure;
}

function drawModel() {
  const { attention, activations } = modelFound;
  $("layer").max = attention.num_layers - 1;
  $("maps").replaceChildren(...attention.heads.map((head, at) => drawMap(head, attention.tokens, at)));
  $("histograms").replaceChildren(...activations.layers.map(drawHistogram));
}

async function attempt(work) {
  try {
    await work();
    $("problem").replaceChildren();
  } catch (error) {
    const box = make("div", error.message, "notice");
    box.setAttribute("role", "alert");
    $("problem").replaceChildren(box);
  }
}

const runOptimizers = () => attempt(async () => {
  const rate = $("rate").value === "" ? null : Number($("rate").value);
  surfaceFound = await ask("optimizers", { surface: $("surface").value, steps: Number($("steps").value), learning_rate: rate });
  drawPaths();
  $("status").textContent = $("paths").getAttribute("aria-label");
});

const readModel = () => attempt(async () => {
  const text = $("text").value;
  const [attention, activations] = await Promise.all([
    ask("attention", { text, layer: Number($("layer").value) }),
    ask("activations", { text }),
  ]);
  modelFound = { attention, activations };
  drawModel();
  $("status").dataset.layer = attention.layer;
  $("status").textContent = `${attention.heads.length} heads of layer ${attention.layer}, ${activations.layers.length} histograms`;
});

$("optimizers-form").addEventListener("submit", (event) => {
  event.preventDefault();
  runOptimizers();
});
$("surface").addEventListener("change", runOptimizers);
$("model-form").addEventListener("submit", (event) => {
  event.preventDefault();
  readModel();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  if (surfaceFound) drawPaths();
  if (modelFound) drawModel();
});

attempt(async () => {
  const { model, surfaces } = await ask("");
  $("surface").replaceChildren(...surfaces.map((name) => make("option", name)));
  $("surface").value = "rosenbrock";
  $("inside").hidden = !model;
  await runOptimizers();
  if (model) await readModel();
  $("badge").textContent = model ?? "optimizers";
  $("badge").hidden = false;
});

// What a chart draws beside its lines: marks of values without a place, levels, and its picture.
function drawMarks({ u, marks, board }) {
  const { ctx, bbox } = u, size = 4 * devicePixelRatio;
  ctx.save();
  ctx.lineWidth = 1.5 * devicePixelRatio;
  for (const { id, kind, x } of marks) {
    if (board.hidden.has(id)) continue;
    ctx.strokeStyle = ctx.fillStyle = board.color(id);
    const top = MARKS[kind].edge === "top", y = top ? bbox.top + size : bbox.top + bbox.height - size;
    for (const place of x) {
      const at = u.valToPos(place, "x", true);
      if (at < bbox.left || at > bbox.left + bbox.width) continue;
      ctx.beginPath();
      if (kind === "nan") {
        ctx.moveTo(at - size, y - size); ctx.lineTo(at + size, y + size);
        ctx.moveTo(at - size, y + size); ctx.lineTo(at + size, y - size);
        ctx.stroke();
        continue;
      }
      const tip = kind === "inf" ? y - size : y + size, base = kind === "inf" ? y + size : y - size;
      ctx.moveTo(at, tip); ctx.lineTo(at - size, base); ctx.lineTo(at + size, base); ctx.closePath();
      if (kind === "dropped") ctx.stroke();
      else ctx.fill();
    }
  }
  ctx.restore();
}

// "n=4" at the end of each stretch of a mean behind which the same number of runs stand.
function drawCounts({ u, aligned, counts, board }) {
  const { ctx, bbox } = u, px = devicePixelRatio, { min, max } = u.scales.x, begun = new Map();
  ctx.save();
  ctx.font = `600 ${11 * px}px sans-serif`;
  ctx.textAlign = "right";
  ctx.lineWidth = 3 * px;
  ctx.strokeStyle = board.paper;
  for (const { id, x, n } of counts) {
    const from = Math.max(min, begun.get(id) ?? -Infinity), to = Math.min(max, x), column = aligned.columns.get(`${id}\nline`);
    begun.set(id, x);
    if (board.hidden.has(id) || !column || to < from || from > max) continue;
    let at = aligned.x.length - 1;
    while (at > 0 && (aligned.x[at] > to || column[at] == null)) at -= 1;
    const [left, top] = [u.valToPos(Math.max(to, from), "x", true), u.valToPos(column[at], "y", true) - 6 * px];
    if (column[at] == null || !Number.isFinite(top)) continue;
    const place = [`n=${n}`, Math.max(left, bbox.left + 26 * px), Math.min(Math.max(top, bbox.top + 10 * px), bbox.top + bbox.height - 2 * px)];
    ctx.fillStyle = board.color(id);
    ctx.strokeText(...place);
    ctx.fillText(...place);
  }
  ctx.restore();
}

function drawRules({ u, options, board, dragged, scale }) {
  const { ctx, bbox } = u, px = devicePixelRatio;
  ctx.save();
  ctx.font = `${12 * px}px sans-serif`;
  ctx.textBaseline = "alphabetic";
  let above = 0;
  for (const rule of options.rules) {
    const y = u.valToPos(rule.drag && dragged !== undefined ? dragged : rule.y * scale.factor, "y", true);
    if (!Number.isFinite(y) || y > bbox.top + bbox.height) continue;
    ctx.strokeStyle = ctx.fillStyle = rule.drag ? board.accent : board.ink;
    if (y < bbox.top) {
      ctx.textAlign = "left";
      ctx.fillText(`↑ ${rule.label}`, bbox.left + 6 * px, bbox.top + (14 + 16 * above++) * px);
      continue;
    }
    ctx.textAlign = "right";
    ctx.lineWidth = 1.5 * px;
    ctx.setLineDash(rule.drag ? [] : [6 * px, 4 * px]);
    ctx.beginPath(); ctx.moveTo(bbox.left, y); ctx.lineTo(bbox.left + bbox.width, y); ctx.stroke();
    ctx.fillText(rule.label, bbox.left + bbox.width - 6 * px, y - 5 * px);
  }
  ctx.restore();
}

// A rule with `drag` follows the pointer; the server hears where it was let go.
function ruleDragging(chart) {
  const { u } = chart, { over } = u;
  const near = (e) => {
    const rule = chart.options.rules.find((r) => r.drag);
    return rule && Math.abs(e.offsetY - u.valToPos(rule.y * chart.scale.factor, "y")) < 7;
  };
  over.addEventListener("pointermove", (e) => { over.style.cursor = near(e) ? "ns-resize" : ""; });
  over.addEventListener("mousedown", (e) => {
    if (!near(e)) return;
    e.stopImmediatePropagation(); // no zoom
    const { top } = over.getBoundingClientRect();
    const move = (m) => { chart.dragged = Math.max(0, u.posToVal(m.clientY - top, "y")); u.redraw(false); };
    const up = () => {
      removeEventListener("mousemove", move);
      if (chart.dragged !== undefined) chart.send("level", chart.dragged / chart.scale.factor);
      chart.dragged = undefined;
    };
    addEventListener("mousemove", move);
    addEventListener("mouseup", up, { once: true });
  }, { capture: true });
}

// The chart as a PNG file, with its title, its axes and a legend of the lines that are shown.
function savePicture(chart) {
  const { board, u } = chart, px = devicePixelRatio, source = u.ctx.canvas, line = 20 * px, edge = 12 * px;
  const shown = [...new Set(chart.names.map(([id]) => id))].filter((id) => !board.hidden.has(id));
  const columns = Math.max(1, Math.floor(source.width / (260 * px))), rows = Math.ceil(shown.length / columns);
  const canvas = document.createElement("canvas"), ctx = canvas.getContext("2d");
  canvas.width = source.width + 2 * edge;
  canvas.height = source.height + 2 * line + rows * line + 2 * edge;
  ctx.fillStyle = board.paper;
  ctx.fillRect(0, 0, canvas.width, canvas.height);
  ctx.fillStyle = board.ink;
  ctx.font = `600 ${15 * px}px sans-serif`;
  ctx.fillText(chart.title.textContent, edge, edge + 14 * px, source.width);
  ctx.font = `${11 * px}px sans-serif`;
  ctx.fillText(chart.note.textContent, edge, edge + 30 * px, source.width);
  ctx.drawImage(source, edge, edge + 2 * line);
  ctx.font = `${12 * px}px sans-serif`;
  shown.forEach((id, i) => {
    const left = edge + (i % columns) * (source.width / columns), y = edge + 2 * line + source.height + (Math.floor(i / columns) + 0.7) * line;
    ctx.strokeStyle = board.color(id);
    ctx.lineWidth = 2 * px;
    ctx.setLineDash(board.style(id).dash.map((d) => d * px));
    ctx.beginPath(); ctx.moveTo(left, y - 4 * px); ctx.lineTo(left + 22 * px, y - 4 * px); ctx.stroke();
    ctx.fillText(board.style(id).label, left + 28 * px, y, source.width / columns - 34 * px);
  });
  canvas.toBlob((blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${chart.options.id.replace(/[^\w.-]+/g, "_")}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }, "image/png");
}

function startOptions() {
  const ROWS = 100;
  const byId = (id) => document.getElementById(id);
  const table = byId("all-options");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = Array.from(body.rows).map((node) => ({
    node, text: node.textContent.toLowerCase(), devices: Number(node.cells[3].dataset.v),
    pricing: node.cells[2].textContent,
    point: null, fits: true,
  }));
  const points = Array.from(document.querySelectorAll("#points use"));
  points.forEach((point) => { rows[Number(point.dataset.row)].point = point; });
  let order = rows.slice();
  let limit = ROWS;

  const filters = byId("filters");
  const field = (name) => byId("f-" + name);
  const number = (name, other) => (field(name).value.trim() === "" ? other : Number(field(name).value));
  const count = new Intl.NumberFormat("en");

  function draw() {
    let shown = 0;
    let matching = 0;
    for (const row of order) {
      row.node.hidden = !row.fits;
      if (row.fits) matching += 1;
      const beyond = row.fits && matching > limit;
      row.node.classList.toggle("beyond", beyond);
      if (row.fits && !beyond) shown += 1;
      if (row.point) row.point.classList.toggle("off", !row.fits);
    }
    byId("count").textContent = matching === 0
      ? "No option matches: clear a filter."
      : count.format(matching) + (matching === rows.length ? "" : " of " + count.format(rows.length))
        + (rows.length === 1 ? " option" : " options");
    if (shown < matching) {
      const part = document.createElement("span");
      part.className = "part";
      part.textContent = ", the first " + count.format(shown) + " shown";
      byId("count").append(part);
    }
    const more = byId("more");
    more.hidden = shown === matching;
    more.textContent = "Show " + count.format(Math.min(2 * ROWS, matching - shown)) + " more";
    rove(null);
  }

  function filter() {
    const text = field("text").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const low = number("low", 0);
    const high = number("high", Infinity);
    const pareto = field("pareto").checked;
    const meets = field("meets").checked;
    for (const row of rows) {
      const data = row.node.dataset;
      row.fits = (field("provider").value === "" || data.provider === field("provider").value)
        && (field("device").value === "" || data.device === field("device").value)
        && (field("pricing").value === "" || row.pricing === field("pricing").value)
        && row.devices >= low && row.devices <= high
        && (!pareto || "pareto" in data) && (!meets || "meets" in data)
        && text.every((word) => row.text.includes(word));
    }
    limit = ROWS;
    draw();
  }

  let waiting = 0;
  filters.hidden = false;
  filters.addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, event.target.id === "f-text" ? 120 : 0);
  });
  byId("f-clear").addEventListener("click", () => {
    filters.querySelectorAll("input, select").forEach((node) => {
      if (node.type === "checkbox") node.checked = false; else node.value = "";
    });
    filter();
  });
  byId("more").addEventListener("click", () => { limit += 2 * ROWS; draw(); });

  function keyOf(row, column) {
    const cell = row.node.cells[column];
    if (cell.classList.contains("number")) return "v" in cell.dataset ? Number(cell.dataset.v) : null;
    return cell.textContent.toLowerCase();
  }
  function sort(column, descending) {
    const keyed = rows.map((row, index) => ({ row, index, key: keyOf(row, column) }));
    const way = descending ? -1 : 1;
    const words = new Intl.Collator("en", { numeric: true });
    keyed.sort((a, b) => {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null) || a.index - b.index;
      const by = typeof a.key === "number" ? a.key - b.key : words.compare(a.key, b.key);
      return way * by || a.index - b.index;
    });
    order = keyed.map((each) => each.row);
    body.replaceChildren(...order.map((row) => row.node));  // one by one takes seconds for 2,000 rows
  }
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sort(column, descending);
      draw();
    });
  });

  // One tab stop for all points: arrow keys move it.
  const place = (point) => [parseFloat(point.getAttribute("x")), parseFloat(point.getAttribute("y"))];
  const across = points.slice().sort((a, b) => place(a)[0] - place(b)[0] || place(a)[1] - place(b)[1]);
  const seen = () => across.filter((point) => !point.classList.contains("off"));
  function rove(target) {
    const open = seen();
    const here = target || open.find((point) => point.tabIndex === 0 && point.classList.contains("on-front"))
      || open.find((point) => point.classList.contains("on-front")) || open[0];
    points.forEach((point) => { point.tabIndex = point === here ? 0 : -1; });
    if (target) target.focus();
  }
  function showRow(point) {
    const row = rows[Number(point.dataset.row)];
    row.node.classList.remove("beyond");
    row.node.scrollIntoView({ block: "center" });
    row.node.focus({ preventScroll: true });
  }
  const group = byId("points");
  if (group) {
    group.addEventListener("click", (event) => { if (event.target.dataset.row) showRow(event.target); });
    group.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowUp: -1, ArrowDown: 1 };
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        showRow(event.target);
        return;
      }
      const along = event.key === "ArrowUp" || event.key === "ArrowDown";
      const open = seen().filter((p) => !along || p.classList.contains("on-front") || p === event.target);
      const at = open.indexOf(event.target);
      const next = event.key === "Home" ? 0 : event.key === "End" ? open.length - 1
        : event.key in steps ? at + steps[event.key] : -1;
      if (!(event.key in steps || event.key === "Home" || event.key === "End")) return;
      event.preventDefault();
      if (open[next]) rove(open[next]);
    });
  }
  body.addEventListener("pointerover", (event) => {
    const node = event.target.closest("tr");
    points.forEach((point) => point.classList.remove("here"));
    const row = node && rows.find((each) => each.node === node);
    if (row && row.point) row.point.classList.add("here");
  });
  draw();
  document.documentElement.classList.add("ready");
}

(function () {
  const form = document.getElementById("asked");
  const state = document.getElementById("state");
  const root = document.documentElement;
  let running = null;
  let waiting = 0;

  const filtersNow = () => Array.from(document.querySelectorAll("#filters input, #filters select"))
    .map((node) => [node.id, node.type === "checkbox" ? node.checked : node.value]);
  function restore(filters) {
    filters.forEach(([id, value]) => {
      const node = document.getElementById(id);
      if (!node) return;
      if (node.type === "checkbox") node.checked = value; else node.value = value;
    });
    const box = document.getElementById("filters");
    if (box && filters.some(([, value]) => value)) box.dispatchEvent(new Event("input", { bubbles: true }));
  }

  async function ask() {
    if (running) running.abort();
    const mine = new AbortController();
    running = mine;
    const query = new URLSearchParams(new FormData(form)).toString();
    root.classList.add("busy");
    state.textContent = "Computing";
    try {
      const began = performance.now();
      const answer = await fetch("/?" + query, { signal: mine.signal });
      if (answer.status === 409) return;
      const text = await answer.text();
      if (mine !== running) return;
      if (!(answer.headers.get("content-type") || "").startsWith("text/html")) throw new Error(text.trim());
      const page = new DOMParser().parseFromString(text, "text/html");
      const filters = filtersNow();
      document.getElementById("problems").replaceChildren(...page.getElementById("problems").children);
      if (answer.ok) {
        root.classList.remove("ready");
        document.title = page.title;
        document.getElementById("answer").replaceChildren(...page.getElementById("answer").children);
        document.getElementById("main").replaceChildren(...page.getElementById("main").children);
        startOptions();
        restore(filters);
        history.replaceState(null, "", "/?" + query);
        state.textContent = "Answered in " + ((performance.now() - began) / 1000).toFixed(1) + " s";
      } else {
        state.textContent = "Not answered: see what is wrong below. The page shows the last answer.";
      }
      root.classList.remove("busy");
    } catch (error) {
      if (mine !== running) return;
      root.classList.remove("busy");
      state.textContent = error instanceof TypeError
        ? "The server does not answer: does plan web still run?" : String(error.message);
    }
  }

  form.addEventListener("submit", (event) => { event.preventDefault(); clearTimeout(waiting); ask(); });
  form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(ask, 400); });
})();

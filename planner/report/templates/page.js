"use strict";
(function () {
  const root = document.documentElement;
  const button = document.getElementById("mode");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.mode ? root.dataset.mode === "dark" : system.matches);
  const name = () => { button.textContent = isDark() ? "Light mode" : "Dark mode"; };
  button.hidden = false;
  button.addEventListener("click", () => { root.dataset.mode = isDark() ? "light" : "dark"; name(); });
  system.addEventListener("change", name);
  name();

  const tip = document.getElementById("tip");
  const textOf = (node) => {
    const mark = node.closest && node.closest("[data-tip], .chart [aria-label]");
    if (!mark || mark.getAttribute("aria-roledescription") === "axis") return "";
    return mark.dataset.tip || mark.getAttribute("aria-label") || "";
  };
  const hide = () => { tip.hidden = true; };
  const show = (text, x, y, spoken) => {
    if (!text) { hide(); return; }
    tip.setAttribute("aria-hidden", String(Boolean(spoken)));  // a focused mark is read by its own label
    tip.textContent = text;
    tip.hidden = false;
    const left = Math.min(x + 12, window.innerWidth - tip.offsetWidth - 8);
    const top = y + 18 + tip.offsetHeight > window.innerHeight ? y - tip.offsetHeight - 10 : y + 18;
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = Math.max(8, top) + "px";
  };
  document.addEventListener("pointermove", (event) => show(textOf(event.target), event.clientX, event.clientY));
  document.addEventListener("pointerdown", (event) => show(textOf(event.target), event.clientX, event.clientY));
  document.addEventListener("focusin", (event) => {
    const box = event.target.getBoundingClientRect();
    show(textOf(event.target), box.left, box.bottom - 10, event.target.hasAttribute("aria-label"));
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  document.addEventListener("scroll", hide, true);
})();

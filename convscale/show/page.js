// Draws every figure from the JSON beside it, in the colours of the page, and again when the scheme or the width class changes.
(() => {
  const NARROW = 560;
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // A colour written as "var(--ink)" in a figure is the page's own.
  const resolve = (value) => {
    if (typeof value === "string") return value.startsWith("var(") ? css(value.slice(4, -1)) : value;
    if (Array.isArray(value)) return value.map(resolve);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item)]));
    return value;
  };
  const themed = (source, width) => {
    const narrow = width < NARROW;
    const figure = resolve(source);
    const layout = figure.layout;
    layout.font = { family: css("--sans"), size: narrow ? 11 : 13, color: css("--ink") };
    layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
    layout.hoverlabel = { align: "left", bgcolor: css("--card"), bordercolor: css("--muted"), font: { color: css("--ink"), family: css("--sans"), size: 12 } };
    layout.autosize = true;
    const hide = (layout.meta || {}).narrow_hides || [];
    if (narrow) {
      layout.dragmode = false;  // A finger that scrolls the page must not zoom the figure.
      layout.height = Math.round((layout.height || 400) * ((layout.meta || {}).narrow_height || 1));
      layout.annotations = (layout.annotations || []).filter((item) => !hide.includes(item.name));
    }
    for (const key of Object.keys(layout)) {
      if (!/^[xy]axis\d*$/.test(key)) continue;
      Object.assign(layout[key], { linecolor: css("--line"), zerolinecolor: css("--line"), automargin: true });
      layout[key].gridcolor = css("--line");
      const title = layout[key].title;
      if (title && title.text) Object.assign(title, { standoff: 8, font: { size: narrow ? 11 : 12, color: css("--muted") } });
    }
    for (const trace of figure.data) {
      if (narrow && trace.meta && trace.meta.narrow_text) trace.text = trace.meta.narrow_text;
    }
    return figure;
  };
  const draw = (element) => {
    const source = JSON.parse(document.getElementById(element.dataset.figure).textContent);
    const figure = themed(source, element.clientWidth);
    element.dataset.narrow = element.clientWidth < NARROW;
    return Plotly.react(element, figure.data, figure.layout, { responsive: true, displaylogo: false, displayModeBar: false });
  };
  const all = [...document.querySelectorAll(".plot[data-figure]")];
  const drawAll = () => Promise.all(all.map(draw)).then(() => { document.documentElement.dataset.drawn = all.length; });
  drawAll();
  scheme.addEventListener("change", drawAll);
  window.addEventListener("resize", () => all.filter((e) => String(e.clientWidth < NARROW) !== e.dataset.narrow).forEach(draw));
})();

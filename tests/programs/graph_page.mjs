// Opens the graph page in Chromium and prints what a user would meet, as one JSON document:
// node graph_page.mjs PLAYWRIGHT-CORE CHROMIUM URL LABELS [SCREENSHOT]
import { createRequire } from "node:module";

const [playwright, executablePath, url, labels, screenshot] = process.argv.slice(2);
const { chromium } = createRequire(import.meta.url)(playwright);
const browser = await chromium.launch({
  executablePath,
  args: [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
  ],
});
const seen = { errors: [], requests: [], looks: [] };
try {
  for (const colorScheme of ["light", "dark"]) {
    for (const [width, height] of [[1480, 460], [1000, 700]]) {
      const page = await browser.newPage({ viewport: { width, height }, colorScheme });
      page.on("console", message => seen.errors.push(`${message.type()}: ${message.text()}`));
      page.on("pageerror", error => seen.errors.push(error.message));
      page.on("request", request => seen.requests.push(request.url()));
      await page.goto(url);
      await page.waitForFunction(n => document.querySelectorAll("g.label").length === n, Number(labels), { timeout: 60000 });
      // The browser tells of the paint once the frame is on the screen, which on a busy machine comes after the labels.
      const painted = () => performance.getEntriesByName("first-contentful-paint").length > 0;
      await page.waitForFunction(painted, null, { timeout: 60000, polling: 50 });
      const look = await page.evaluate(() => {
        const box = element => {
          const { left, right, top, bottom } = element.getBoundingClientRect();
          return { left, right, top, bottom };
        };
        const all = [...document.querySelectorAll("g.label")];
        return {
          labels: all.map(label => ({ text: label.textContent, ...box(label) })),
          texts: all.flatMap(label => [...label.querySelectorAll("text")].map(text => ({ text: text.textContent, ...box(text), around: box(label.querySelector("rect")) }))),
          locks: document.querySelectorAll("g.edge:not(.plain) .lock").length,
          first_paint: performance.getEntriesByName("first-contentful-paint")[0].startTime,
          markup: document.querySelectorAll("main b, main i, main img, main script").length,
        };
      });
      if (screenshot && colorScheme === "light" && width === 1480) await page.screenshot({ path: screenshot });
      await page.click("g.edge g.label");
      look.detail = await page.textContent("aside");
      await page.click("g.node g.label");
      look.node = await page.textContent("aside h2");
      // The page asks again by itself.
      const asked = seen.requests.length;
      for (let i = 0; i < 300 && seen.requests.length === asked; i++) await page.waitForTimeout(100);
      look.asks_again = seen.requests.length > asked;
      seen.looks.push(look);
      await page.close();
    }
  }
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen));

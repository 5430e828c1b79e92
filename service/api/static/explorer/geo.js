/** Projections: UTM zones, EPSG:4326, EPSG:3857 and EPSG:3035, to longitude and latitude and back. */

const A = 6378137;
const N = 1 / 298.257223563 / (2 - 1 / 298.257223563);
const K0 = 0.9996;
// Krüger's series to the fourth order: below a millimetre within a zone (Karney 2011,
// arXiv 1002.1417, equations 35 and 36).
const RADIUS = (A / (1 + N)) * (1 + N ** 2 / 4 + N ** 4 / 64);
const ALPHA = [
  N / 2 - (2 / 3) * N ** 2 + (5 / 16) * N ** 3 + (41 / 180) * N ** 4,
  (13 / 48) * N ** 2 - (3 / 5) * N ** 3 + (557 / 1440) * N ** 4,
  (61 / 240) * N ** 3 - (103 / 140) * N ** 4,
  (49561 / 161280) * N ** 4,
];
const BETA = [
  N / 2 - (2 / 3) * N ** 2 + (37 / 96) * N ** 3 - N ** 4 / 360,
  N ** 2 / 48 + N ** 3 / 15 - (437 / 1440) * N ** 4,
  (17 / 480) * N ** 3 - (37 / 840) * N ** 4,
  (4397 / 161280) * N ** 4,
];
const DEGREE = Math.PI / 180;

/**
 * The transformation of a CRS.
 *
 * @param {number} epsg
 * @returns {{toLonLat: (x: number, y: number) => [number, number],
 *            fromLonLat: (lon: number, lat: number) => [number, number]} | null}
 *          null for a CRS that this page cannot transform
 */
export function projection(epsg) {
  if (epsg === 4326) return { toLonLat: (x, y) => [x, y], fromLonLat: (x, y) => [x, y] };
  if (epsg === 3857) {
    return {
      toLonLat: (x, y) => [x / A / DEGREE, Math.atan(Math.sinh(y / A)) / DEGREE],
      fromLonLat: (lon, lat) => [A * lon * DEGREE, A * Math.asinh(Math.tan(lat * DEGREE))],
    };
  }
  if (epsg === 3035) return equalArea(52, 10, 4321000, 3210000);
  const north = epsg > 32600 && epsg <= 32660;
  if (!north && !(epsg > 32700 && epsg <= 32760)) return null;
  const middle = ((epsg % 100) * 6 - 183) * DEGREE;
  const falseNorthing = north ? 0 : 1e7;
  const e = Math.sqrt((4 * N) / (1 + N) ** 2);
  return {
    fromLonLat(lon, lat) {
      const sine = Math.sin(lat * DEGREE);
      const t = Math.sinh(Math.atanh(sine) - e * Math.atanh(e * sine));
      const difference = lon * DEGREE - middle;
      const xi = Math.atan2(t, Math.cos(difference));
      const eta = Math.atanh(Math.sin(difference) / Math.hypot(1, t));
      const [northing, easting] = series(xi, eta, ALPHA, 1);
      return [5e5 + K0 * RADIUS * easting, falseNorthing + K0 * RADIUS * northing];
    },
    toLonLat(x, y) {
      const [xi, eta] = series((y - falseNorthing) / (K0 * RADIUS), (x - 5e5) / (K0 * RADIUS), BETA, -1);
      const conformal = Math.asin(Math.sin(xi) / Math.cosh(eta));
      let latitude = conformal;
      for (let round = 0; round < 6; round++) {
        latitude = Math.asin(Math.tanh(Math.atanh(Math.sin(conformal)) + e * Math.atanh(e * Math.sin(latitude))));
      }
      return [(middle + Math.atan2(Math.sinh(eta), Math.cos(xi))) / DEGREE, latitude / DEGREE];
    },
  };
}

function series(xi, eta, coefficients, sign) {
  let [first, second] = [xi, eta];
  coefficients.forEach((coefficient, at) => {
    const k = 2 * (at + 1);
    first += sign * coefficient * Math.sin(k * xi) * Math.cosh(k * eta);
    second += sign * coefficient * Math.cos(k * xi) * Math.sinh(k * eta);
  });
  return [first, second];
}

/** Lambert's azimuthal equal-area projection of the ellipsoid (Snyder 1987, equations 24-17 to 24-29). */
function equalArea(latitudeOfOrigin, longitudeOfOrigin, falseEasting, falseNorthing) {
  const e = Math.sqrt((4 * N) / (1 + N) ** 2);
  const authalic = (sine) => (1 - e * e) * (sine / (1 - (e * sine) ** 2)
    - Math.log((1 - e * sine) / (1 + e * sine)) / (2 * e));
  const qp = authalic(1);
  const radius = A * Math.sqrt(qp / 2);
  const sine0 = Math.sin(latitudeOfOrigin * DEGREE);
  const beta0 = Math.asin(authalic(sine0) / qp);
  const scale = (A * Math.cos(latitudeOfOrigin * DEGREE))
    / Math.sqrt(1 - (e * sine0) ** 2) / (radius * Math.cos(beta0));
  return {
    fromLonLat(lon, lat) {
      const beta = Math.asin(authalic(Math.sin(lat * DEGREE)) / qp);
      const difference = (lon - longitudeOfOrigin) * DEGREE;
      const b = radius * Math.sqrt(2 / (1 + Math.sin(beta0) * Math.sin(beta)
        + Math.cos(beta0) * Math.cos(beta) * Math.cos(difference)));
      const northward = Math.cos(beta0) * Math.sin(beta)
        - Math.sin(beta0) * Math.cos(beta) * Math.cos(difference);
      return [falseEasting + b * scale * Math.cos(beta) * Math.sin(difference),
        falseNorthing + (b / scale) * northward];
    },
    toLonLat(x, y) {
      const east = (x - falseEasting) / scale;
      const north = (y - falseNorthing) * scale;
      const distance = Math.hypot(east, north);
      if (!distance) return [longitudeOfOrigin, latitudeOfOrigin];
      const angle = 2 * Math.asin(distance / (2 * radius));
      const q = qp * (Math.cos(angle) * Math.sin(beta0)
        + (north * Math.sin(angle) * Math.cos(beta0)) / distance);
      let latitude = Math.asin(q / qp);
      for (let round = 0; round < 8; round++) {
        const sine = Math.sin(latitude);
        latitude += ((1 - (e * sine) ** 2) ** 2 / (2 * Math.cos(latitude)))
          * ((q - authalic(sine)) / (1 - e * e));
      }
      const difference = Math.atan2(east * Math.sin(angle),
        distance * Math.cos(beta0) * Math.cos(angle) - north * Math.sin(beta0) * Math.sin(angle));
      return [longitudeOfOrigin + difference / DEGREE, latitude / DEGREE];
    },
  };
}
